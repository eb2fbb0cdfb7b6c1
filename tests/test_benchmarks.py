"""Every benchmark runs, at its smallest; and the README quotes what was recorded."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustify import models

BENCHMARKS = Path(__file__).parent / "benchmarks"
NAMES = sorted(
    path.stem for path in BENCHMARKS.glob("*.py")
    if "results.parser(" in path.read_text()
)  # fmt: skip
LIBRARIES = {  # of which each needs one
    "pgd_against_libraries": ("torchattacks", "foolbox"),
    "evaluation_against_libraries": ("torchattacks",),
}


@pytest.fixture
def results(monkeypatch):
    """The module that keeps and quotes results."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import results

    return results


def classifier(folder):
    """A network for the digits, saved: what an evaluation is told to attack."""
    network = models.create("resnet20_cifar", num_classes=10, in_chans=1, image_size=8)
    models.save(network, folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, tmp_path, request):
    libraries = LIBRARIES.get(name, ())
    if libraries and not any(map(importlib.util.find_spec, libraries)):
        pytest.skip(f"needs {' or '.join(libraries)}")
    if name == "standard_against_reference":
        request.getfixturevalue("shared")  # the reference's figures
    words = [classifier(tmp_path)] if name == "evaluation_against_libraries" else []
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", "--quick", *words], timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"### `{name}`")
    assert "\n| " in done.stdout


def test_every_benchmark_has_a_recorded_run(results):
    assert sorted(results.read()) == NAMES


def test_the_readme_quotes_the_recorded_runs(results):
    """After a recorded run `python tests/benchmarks/results.py` writes the README's tables anew."""
    readme = results.README.read_text("utf-8")
    assert results.quoted(readme) == results.section(results.read())


def test_a_recorded_run_says_what_it_was_measured_on(results):
    for name, entry in results.read().items():
        assert entry["command"].startswith(f"python tests/benchmarks/{name}.py")
        assert "--quick" not in entry["command"]
        assert entry["machine"].keys() >= {"cpu", "cores", "memory GiB"}
        assert entry["versions"].keys() >= {"python", "torch", "timm"}
        assert entry["date"]
