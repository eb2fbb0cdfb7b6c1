"""A sweep: which runs it makes, where, and that it goes on from wherever it was stopped."""

import json
import os
import signal
import sys

import pytest

from robustify import harden
from robustify.__main__ import main
from robustify.errors import UsageError
from robustify.sweep import combinations, plan
from robustify.train import Stage

CHAIN = [
    "distill", "--recipe", "teacher_assistant", "--student", "cnn_a", "--set", "controls=false",
    "--sweep", "temperature=1,20", "--max-steps", "3", "--limit", "20", "--suite", "pgd",
]  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command line in an empty folder: exit code and stdout."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["robustify", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_code:
            main()
        return exit_code.value.code, capsys.readouterr().out

    return call


def test_every_combination_is_a_run_with_a_name_of_its_own():
    assert combinations(["temperature=1,5", "training.lr=1e-3,8/255"]) == {
        "temperature=1,training.lr=1e-3": {"temperature": 1, "training.lr": "1e-3"},
        "temperature=1,training.lr=8_255": {"temperature": 1, "training.lr": "8/255"},
        "temperature=5,training.lr=1e-3": {"temperature": 5, "training.lr": "1e-3"},
        "temperature=5,training.lr=8_255": {"temperature": 5, "training.lr": "8/255"},
    }
    assert combinations(["training.decay_at=[0.5, 0.7],[]"]) == {
        "training.decay_at=0.5_0.7": {"training.decay_at": [0.5, 0.7]},
        "training.decay_at=": {"training.decay_at": []},
    }


@pytest.mark.parametrize("pair", ["temperature", "=1,2", "temperature=", "temperature=[1,2"])
def test_what_is_no_sweep_is_refused(pair):
    with pytest.raises(UsageError, match="expected --sweep key=value"):
        combinations([pair])


@pytest.mark.parametrize("pair", ["temperature=1", "temperature=1,1"])
def test_one_value_is_no_sweep(pair):
    with pytest.raises(UsageError, match="two or more different values"):
        combinations([pair])


def test_all_runs_are_checked_before_any_is_made():
    def planned(settings):
        return harden.plan("peeraid", "cnn_a", settings=settings)

    with pytest.raises(UsageError, match=r"did you mean 'method\.temperature'"):
        plan(["temprature=1,2"], {}, planned)
    jobs = plan(["temperature=1,2"], {"kd_weight": 3}, planned)
    assert [job.method["temperature"] for job in jobs.values()] == [1, 2]
    assert {job.method["kd_weight"] for job in jobs.values()} == {3}
    assert len({id(job.dataset) for job in jobs.values()}) == 1


def test_the_table_of_the_temperatures(run, tmp_path):
    code, out = run(*CHAIN, "--out", tmp_path / "t")
    assert code == 0
    header = next(line for line in out.splitlines() if "S1 (median)" in line)
    for column in ("clean accuracy", "S2 / T", "S3 (Linf)", "naive", "adaptive", "verdict"):
        assert column in header
    assert "| A temperature=1 " in out
    assert "| B temperature=20 " in out
    assert "temperature=20" in (tmp_path / "t" / "comparison.html").read_text()
    assert "| A temperature=1 " in (tmp_path / "t" / "comparison.md").read_text()
    report = json.loads((tmp_path / "t" / "temperature=20" / "report.json").read_text())
    assert report["defenses"] == ["defensive distillation"]
    assert report["sensitivity"]["temperature"] == 20
    assert set(report["sensitivity"]["s1"]) == {"1", "20"}
    sides = {row["name"]: row["tier"] for row in report["side_by_side"]}
    assert sides["pgd-ce"] == "naive"
    assert sides["pgd-ce-tempered"] == sides["pgd-ce-scaled"] == "adaptive"
    (transfer,) = [a for a in report["attacks"] if a["name"] == "transfer"]
    assert transfer["settings"]["transfer_from"] == ["teacher", "assistant 1"]
    page = (tmp_path / "t" / "temperature=20" / "report.md").read_text()
    assert "### Sensitivity to the images" in page
    file = tmp_path / "t" / "temperature=20" / "model.safetensors"
    again = json.loads(run("evaluate", file, "--limit", 20, "--suite", "pgd", "--json")[1])
    for key in ("defenses", "sensitivity", "side_by_side", "notices"):
        assert again[key] == report[key]


def test_an_interrupted_sweep_goes_on_and_ends_like_an_untouched_one(run, tmp_path, monkeypatch):
    command = [
        "distill", "--recipe", "standard", "--student", "cnn_a", "--max-steps", "3",
        "--sweep", "training.lr=1e-3,1e-2", "--limit", "8", "--suite", "fgsm",
    ]  # fmt: skip
    assert run(*command, "--out", tmp_path / "whole")[0] == 0
    made, step = [], Stage.step

    def interrupted(self, fetched):
        made.append(self)
        if len(made) == 5:  # the second step of the second run
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, fetched)

    monkeypatch.setattr(Stage, "step", interrupted)
    assert run(*command, "--out", tmp_path / "parts")[0] == 130
    records = [json.loads((tmp_path / "parts" / f"training.lr={lr}" / "robustify.json").read_text())
               for lr in ("1e-3", "1e-2")]  # fmt: skip
    assert [record["status"] for record in records] == ["finished", "interrupted"]
    assert not (tmp_path / "parts" / "comparison.md").exists()
    code, out = run(*command, "--out", tmp_path / "parts", "--json")
    assert code == 0
    assert [row["run"] for row in json.loads(out)] == ["training.lr=1e-3", "training.lr=1e-2"]
    assert len(made) == 6  # three steps of each run, none of them twice
    for lr in ("1e-3", "1e-2"):
        weights = [(tmp_path / run / f"training.lr={lr}" / "model.safetensors").read_bytes()
                   for run in ("whole", "parts")]  # fmt: skip
        assert weights[0] == weights[1]


def test_a_run_is_no_folder_for_a_sweep(run, tmp_path, capsys):
    (tmp_path / "robustify.json").write_text("{}")
    assert run(*CHAIN, "--out", tmp_path)[0] == 2
    assert not (tmp_path / "temperature=1").exists()


def test_a_dry_run_shows_every_run_and_makes_none(run, tmp_path):
    code, out = run(*CHAIN, "--dry-run")
    assert code == 0
    found = json.loads(out)
    assert [(row["run"], row["method"]["temperature"]) for row in found] == [
        ("temperature=1", 1), ("temperature=20", 20),
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())
