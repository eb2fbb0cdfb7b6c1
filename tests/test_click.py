"""The command line with the oldest click that pyproject.toml allows."""

import subprocess
import sys

PLAIN = """
import click

class Plain(click.ParamType):
    __class_getitem__ = None  # as before click 8.4, where ParamType[float] is a TypeError

click.ParamType = Plain
from robustify import cli
assert cli.Eps().convert("8/255", None, None) == 8 / 255
assert cli.EpsList().convert("0,1", None, None) == (0, 1)
"""


def test_parameter_types_need_no_generic_click():
    result = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
