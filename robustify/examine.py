"""From a name to a report: any classifier, on the test images of any data set."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from tqdm import tqdm

import robustify
from robustify import data, models
from robustify.classifier import Classifier
from robustify.data import DataSet
from robustify.errors import NOTHING_KEPT, ModelError, RunFolderError, UsageError, leaving
from robustify.evaluation import LEVEL_OF_SUITE, Report, evaluate
from robustify.gallery import gallery
from robustify.identity import digest
from robustify.journal import Journal
from robustify.memory import ran_out
from robustify.plausible import Reference
from robustify.processes import first_holds, this_process
from robustify.purifier import Purified, facts
from robustify.report import complete, read, write_report
from robustify.run_folder import locked
from robustify.sensitivity import sensitivity
from robustify.threat import Norm, ThreatModel, chosen
from robustify.tiers import extend

log = logging.getLogger(__name__)

SENSITIVITY_IMAGES = 1000  # our choice, as for the checks: one gradient per class and image


def assess(
    model: Classifier,
    dataset: DataSet,
    threat: ThreatModel,
    *,
    suite: str,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    transfer_from: Mapping[str, Classifier] | None = None,
    out: Path | None = None,
) -> Report:
    """`evaluate` on the first `limit` images of the test split, over all processes, with progress.

    With `out`, verdicts are kept there as they fall, and an interrupted evaluation goes on; those
    of other models, data, threat models or suites stand beside them. Raises `RunFolderError` where
    `out` cannot be written.
    """
    device = next(model.parameters()).device
    test = dataset.test.take(len(dataset.test) if limit is None else limit)
    images, labels, _ = test.__getitems__(range(len(test)))
    process = this_process()
    journal = None
    if out is not None:
        identity = {
            "version": robustify.__version__,
            "model": models.describe(model),
            "weights": models.weights_hash(model),
            "data": dataset.fingerprint,
            "n": len(test),
            "threat_model": vars(threat),
            "suite": suite,
            "seed": seed,
            "transfer_from": sorted(map(models.weights_hash, (transfer_from or {}).values())),
        }
        journal = Journal(
            out / "verdicts" / digest(identity), identity, process=process.process_index
        )
    bar = tqdm(unit="verdict", disable=not process.is_main_process, mininterval=1, desc=suite)

    def decided(attack: str, image: int, right: bool) -> None:
        if journal is not None:
            journal.record(attack, image, right)
        bar.set_postfix_str(attack, refresh=False)
        bar.update()

    with _within_memory(journal), bar, closing(journal) if journal is not None else nullcontext():
        return evaluate(
            model, data.to_float(images).to(device), labels.to(device), suite=suite,
            norm=threat.norm, eps=threat.eps, seed=seed, batch_size=batch_size,
            class_names=dataset.class_names, sharded=True, decided=decided,
            reference=Reference(
                data=dataset.name,
                parameters=sum(p.numel() for p in model.parameters()),
                architecture=model.architecture,
            ),
            checks=LEVEL_OF_SUITE.get(suite, "quick") if _defenses(model) else None,
            temperature=model.about.get("record", {}).get("temperature"),
            preprocessed=isinstance(model, Purified),
            transfer_from=transfer_from,
            done=journal.verdicts if journal is not None else None,
        )  # fmt: skip


@contextmanager
def _within_memory(journal: Journal | None) -> Iterator[None]:
    """Say in one line that memory ran out, with even the smallest batches or for the images."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        kept = NOTHING_KEPT
        if journal is not None:
            kept = (
                f"every verdict so far is kept in {journal.path.parent}, and with more memory free "
                "the same command goes on from them"
            )
        raise ModelError(
            f"out of memory in the evaluation; {kept}; to need less, evaluate with a smaller "
            "--batch-size or --limit"
        ) from error


def examine(
    model: str,
    *,
    dataset: str | None = None,
    suite: str = "fast",
    norm: Norm | None = None,
    eps: Sequence[float] = (),
    limit: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    transfer_from: Sequence[str] = (),
    out: Path | None = None,
) -> dict[str, Any] | None:
    """`robustify evaluate`: the content of a report on any model that `models.load` understands;
    None in every process but the first.

    Data set and threat model are those named in the model's metadata, unless given. The first of
    several `eps` is the headline, all of them together the curve. `transfer_from` names further
    models; what PGD finds on them is tried on this one. `out` is held against other processes.
    """
    classifier = models.load(model)
    process = this_process()
    classifier.to(process.device)
    if out is not None:
        _require_own(out, models.weights_hash(classifier), model)
    name = dataset or classifier.data
    if name is None:
        raise UsageError(f"expected --data, because {model} does not say what it was trained on")
    loaded = data.load(name, image_size=classifier.image_size)
    models.match_labels(classifier, loaded.class_names)
    fit_together(classifier, loaded, model)
    known = classifier.about.get("threat_model") or vars(loaded.threat)
    usual = ThreatModel(known["norm"], known["eps"])
    threats = [chosen(norm, value, usual) for value in eps or (None,)]
    surrogates = {other: models.load(other).to(process.device) for other in transfer_from}
    for other, surrogate in surrogates.items():
        fit_together(surrogate, loaded, other)
    with leaving(NOTHING_KEPT) if out is None else first_holds(locked(out)):
        reports = [
            assess(classifier, loaded, threat, suite=suite, limit=limit, seed=seed,
                   batch_size=batch_size, transfer_from=surrogates,
                   out=out and out / f"eps-{threat.eps:.6g}")
            for threat in threats
        ]  # fmt: skip
        if not process.is_main_process:
            return None
        about: dict[str, Any] = {
            "model": {
                **models.describe(classifier),
                "weights_hash": models.weights_hash(classifier),
            },
            "data": loaded,
            "more": {"notices": list(classifier.about.get("record", {}).get("notices", ()))},
        }
        if isinstance(classifier, Purified):
            about["model"] |= facts(classifier)
            reports[0], about["more"] = extend(
                reports[0], classifier, loaded, more=about["more"], batch_size=batch_size
            )
        about["more"] |= masking(classifier, loaded, reports[0]) | shown(reports[0], loaded)
        if len(reports) > 1:
            about["more"]["curve"] = [curve_point(report) for report in reports]
        if out is not None:
            write_report(out, reports[0], **about)
        return complete(reports[0], **about)


def _require_own(out: Path, weights_hash: str, name: str) -> None:
    """Raise `RunFolderError` where `out` holds the report of other weights."""
    if (out / "report.json").is_file():
        there = read(out)["model"].get("weights_hash", weights_hash)
        if there != weights_hash:
            raise RunFolderError(
                f"{out} holds the report of other weights than those of {name}; choose another "
                "--out"
            )


def _defenses(model: Classifier) -> list[str]:
    """The defenses, known for masking gradients, that its recipe says a model was trained by."""
    return list(model.about.get("record", {}).get("defenses", ()))


def masking(model: Classifier, dataset: DataSet, report: Report) -> dict[str, Any]:
    """What the report on a model with such a defense must hold besides: which, and sensitivity."""
    if not _defenses(model):
        return {}
    n = min(report.n, SENSITIVITY_IMAGES)
    images, labels, _ = dataset.test.take(n).__getitems__(range(n))
    device = next(model.parameters()).device
    found = sensitivity(model, data.to_float(images).to(device), labels.to(device),
                        temperature=float(model.about["record"]["temperature"]))  # fmt: skip
    return {"defenses": _defenses(model), "sensitivity": found}


def shown(report: Report, dataset: DataSet) -> dict[str, Any]:
    """The gallery of fallen images, and the versions of everything that can change a result."""
    indices = torch.tensor(sorted(report.fallen), dtype=torch.int64)
    more: dict[str, Any] = {"versions": versions()}
    if len(indices):
        images, labels, _ = dataset.test.take(report.n).__getitems__(indices.tolist())
        more["gallery"] = gallery(
            data.to_float(images),
            torch.stack([report.fallen[index][1] for index in indices.tolist()]),
            labels,
            report.predictions[indices],
            report.fallen_predictions[indices],
            dataset.class_names,
            attacks=[report.fallen[index][0] for index in indices.tolist()],
            indices=indices,
        )
    return more


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    packages = ("torch", "timm", "accelerate")
    return {
        "robustify": robustify.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def diagnose_machine() -> dict[str, str]:
    """Devices, versions, caches, and whether a Hub token is present (never the token)."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **versions(),
        "GPUs": ", ".join(gpus) or "none",
        "CPU threads": str(torch.get_num_threads()),
        "bf16 on this device": str(torch.cuda.is_bf16_supported() if gpus else True),
        "Hub cache": huggingface_hub.constants.HF_HUB_CACHE,
        "Hub token": "present" if huggingface_hub.get_token() else "none",
        "offline": str(huggingface_hub.constants.HF_HUB_OFFLINE),
    }


def curve_point(report: Report) -> dict[str, Any]:
    """One point of accuracy against eps."""
    content = report.to_dict()
    return {
        **{key: content["threat_model"][key] for key in ("eps", "eps_text")},
        "robust_accuracy": report.robust_accuracy,
        "interval": report.interval,
        "attack": f"suite {report.suite}",
    }


def fit_together(model: Classifier, dataset: DataSet, name: str) -> None:
    """Raise `UsageError` where the model cannot be asked about these images."""
    if model.num_classes != dataset.num_classes:
        raise UsageError(
            f"expected a model for the {dataset.num_classes} classes of {dataset.name}, got {name} "
            f"with {model.num_classes}; name its own data set with --data"
        )
    if model.in_chans != dataset.in_chans:
        raise UsageError(
            f"expected a model for images with {dataset.in_chans} channels, got {name} with "
            f"{model.in_chans}; name its own data set with --data"
        )
