"""The README: every command in it runs, the tree is the tree, the recipes are the recipes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub, serving

from robustify import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line and not line.startswith("#")
]
SETUP = [line for line in COMMANDS if line.startswith("python3 -m venv")]
SMALL = {  # what keeps a command within seconds; nothing else of it is changed
    "distill": ["--max-steps", "1", "--limit", "8", "--suite", "fgsm"],
    "evaluate": ["--limit", "8", "--suite", "fgsm"],
    "examples": ["--max-steps", "1", "--limit", "8", "--seeds", "0", "--suite", "fgsm"],
}


def test_the_two_commands_are_what_continuous_integration_runs():
    assert len(SETUP) == 2
    script = (ROOT / ".ci" / "run").read_text()
    for heading in ("### Run the main job", "### Pass the tests"):
        assert heading in README
        assert f"block '{heading}'" in script


@pytest.fixture
def environment(tmp_path):
    """That of a machine whose Hub is a server on loopback, where `user` has a token."""
    with serving(Hub({"hf_token": "user"})) as hub:
        yield {
            **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
            "OMP_NUM_THREADS": "1", "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_token",
            "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip


def test_every_command_runs(tmp_path, environment):
    for command in COMMANDS:
        if command in SETUP:
            continue
        words = shlex.split(command)
        if words[0] == "robustify":
            words = ["-m", "robustify", *words[1:], *SMALL.get(words[1], [])]
        else:
            assert words[0] == "python"
            words = [str(ROOT / words[1]), *words[2:], *SMALL["examples"]]
        result = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True,
            text=True, timeout=600,
        )  # fmt: skip
        assert result.returncode == 0, f"{command}: {result.stderr[-2000:]}"


def test_the_tree_names_every_module_and_no_other():
    tree = README.split("## The tree")[1].split("```")[1]
    shown = set(re.findall(r"^    (\w+)\.py", tree, re.MULTILINE))
    there = {path.stem for path in (ROOT / "robustify").glob("*.py")} - {"__init__", "__main__"}
    assert shown == there


def test_every_recipe_stands_in_the_table():
    for name in config.names():
        assert f"| `{name}` |" in README
