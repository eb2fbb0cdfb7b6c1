"""Attach: put a distilled purifier before any classifier, and measure the pair end to end.

Robustness of a purifier belongs to the classifier it was trained before. What is left here is
therefore marked as a transferred purifier, carries no old number over, and shows the clean accuracy
of the classifier alone beside that of the pair.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from robustify import data, models
from robustify.classifier import Classifier
from robustify.errors import ModelError, RobustifyError
from robustify.examine import assess, fit_together
from robustify.processes import first_holds, said, this_process
from robustify.purifier import (
    Purified,
    SavedPurifier,
    facts,
    purifier_file,
    read_purifier,
)
from robustify.report import write_report
from robustify.run_folder import RunFolder
from robustify.threat import Norm, ThreatModel, chosen
from robustify.tiers import extend
from robustify.weights import CLASSIFIER_FOLDER

log = logging.getLogger(__name__)


def attach(
    purifier: str | Path,
    classifier: str | Path,
    out: str | Path,
    *,
    dataset: str | None = None,
    suite: str = "fast",
    norm: Norm | None = None,
    eps: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Path:
    """Join a purifier (a folder that `distill` left, or its file) with a classifier (anything that
    `models.load` understands) in the folder `out`, evaluate the pair, and return the folder.

    Data set: `dataset`, or what the classifier, or the purifier, was trained on; threat model: that
    of the purifier's training unless given. The same call again leaves a finished folder as it is,
    and goes on from the verdicts of one that is not. Over several processes, all of them call it.
    Raises `ModelError` and `UsageError` for what does not fit, `RunFolderError` for the folder.
    """
    saved = _saved(purifier)
    pair = saved.transfer(models.load(classifier))
    loaded = data.load(dataset or pair.data or saved.about.get("data") or "digits",
                       image_size=pair.image_size)  # fmt: skip
    _check(saved, pair, loaded, str(classifier))
    trained = saved.about.get("threat_model") or vars(loaded.threat)
    threat = chosen(norm, eps, ThreatModel(trained["norm"], trained["eps"]))
    run = {
        "attach": {"purifier": str(saved.path), "classifier": str(classifier), **facts(pair)},
        "data": {"name": loaded.name, "fingerprint": loaded.fingerprint},
        "threat_model": vars(threat),
        "suite": suite,
        "limit": limit,
        "seed": seed,
    }
    folder = RunFolder(Path(out))
    process = this_process()
    first = process.is_main_process
    with first_holds(folder.held(run)):
        if said(folder.record if first else None).get("status") == "finished":
            log.warning("%s is already finished; choose another --out", folder.path)
            return folder.path
        if first:
            models.save(pair, folder.path, {"data": loaded.source})
        report = assess(pair.to(process.device), loaded, threat, suite=suite, limit=limit,
                        seed=seed, batch_size=batch_size, out=folder.path)  # fmt: skip
        if not first:
            return folder.path
        recorded = {"notices": pair.about.get("record", {}).get("notices", ())}
        report, more = extend(report, pair, loaded, more=recorded, batch_size=batch_size,
                              surrogate=_original(saved, pair))  # fmt: skip
        write_report(folder.path, report, model=described(pair), data=loaded, more=more)
        folder.update(status="finished", transferred=pair.about["transferred"], **facts(pair))
    return folder.path


def described(pair: Purified) -> dict[str, Any]:
    """What a report says about the model."""
    recorded = {key: pair.about.get(key) for key in ("transferred", "threat_model")}
    described = {**models.describe(pair), "weights_hash": models.weights_hash(pair)}
    return {**described, **facts(pair), **recorded}


def _saved(purifier: str | Path) -> SavedPurifier:
    file = purifier_file(purifier)
    if file is None:
        raise ModelError(
            f"expected a folder with purifier.safetensors, or that file, got {purifier}; make one "
            "with robustify distill --recipe purifier"
        )
    return read_purifier(file)


def _check(saved: SavedPurifier, pair: Purified, loaded: data.DataSet, name: str) -> None:
    """Raise where classifier and data differ; say where purifier and classifier do."""
    fit_together(pair, loaded, name)
    own = pair.class_names
    if own is not None and own != loaded.class_names:
        first = next(
            i for i, (a, b) in enumerate(zip(own, loaded.class_names, strict=True)) if a != b
        )
        raise ModelError(
            f"expected a classifier for the classes of {loaded.name} in their order, but class "
            f"{first} is {loaded.class_names[first]!r}, and {own[first]!r} for {name}; choose "
            "another classifier, or its own data set with --data"
        )
    if saved.classifier.get("image_size") != pair.image_size:
        log.warning(
            "the purifier was trained on images of %s pixels, %s takes %d: it works at any size, "
            "but was never measured at this one",
            saved.classifier.get("image_size"), name, pair.image_size,
        )  # fmt: skip


def _original(saved: SavedPurifier, pair: Purified) -> Classifier | None:
    """The classifier that the purifier was trained before, as the surrogate of tier G0, if it lies
    beside the purifier, is another one, and answers for the same classes."""
    try:
        original = models.load(saved.path.parent / CLASSIFIER_FOLDER)
    except RobustifyError:
        return None
    same = models.weights_hash(original) == pair.sha256
    fits = (original.num_classes, original.in_chans) == (pair.num_classes, pair.in_chans)
    device = next(pair.parameters()).device
    return original.to(device) if fits and not same else None
