"""A profile says where a step's time goes, and leaves the run as it was."""

import json
import logging

import torch
from loops import stage, weights

from robustify.checkpoint import Checkpoints
from robustify.fit import fit
from robustify.profiling import PHASES, STEPS, profiling


def fitted(folder, *, wanted, **settings):
    """A short stage under `profiling`."""
    run = stage(epochs=2, **settings)
    folder.mkdir(exist_ok=True)
    with profiling(folder, "short", wanted=wanted) as on_step:
        fit(run, checkpoints=Checkpoints(folder / "checkpoints"), on_step=on_step)
    return weights(run)


def test_the_profile_has_the_phases_of_a_step_and_changes_no_bit(tmp_path):
    plain = fitted(tmp_path / "plain", wanted=False)
    assert torch.equal(fitted(tmp_path, wanted=True), plain)
    text = (tmp_path / "profile-short.txt").read_text()
    rows = [line.split() for line in text.split("\n\n")[0].splitlines()[2:]]
    found = {" ".join(row[:-2]): (float(row[-2]), float(row[-1])) for row in rows}
    assert found.keys() > set(PHASES)
    step, share = found.pop("a step")
    assert share == 100
    assert abs(sum(time for time, _ in found.values()) - step) < 0.1 * len(found)
    assert found["backward"][0] > 0
    assert found["inner maximisation"][0] == 0  # this objective has none
    assert "convolution_backward" in text
    trace = json.loads((tmp_path / "profile-short.json").read_text())["traceEvents"]
    assert sum(event["name"] == "optimizer" for event in trace) == STEPS
    assert not (tmp_path / "plain" / "profile-short.txt").exists()


def test_a_run_too_short_for_a_profile_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        fitted(tmp_path, wanted=True, max_steps=3)
    assert "no profile of short: expected at least 6 steps, got 3" in caplog.text
    assert not list(tmp_path.glob("profile*"))
