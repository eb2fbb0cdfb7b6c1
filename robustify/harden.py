"""The whole story: load, train every stage, evaluate, save. What `robustify distill` does."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
)

from robustify import config, course, data, models
from robustify.attacks.pgd import pgd
from robustify.batch_size import find_batch_size
from robustify.classifier import Classifier
from robustify.compilation import compiling
from robustify.data import DataSet
from robustify.errors import UsageError
from robustify.examine import assess, masking, shown, versions
from robustify.fit import fit
from robustify.frozen import Frozen
from robustify.objective import Objective
from robustify.processes import PATIENCE, agreed, first_holds, on_cpu, said, this_process
from robustify.profiling import profiling
from robustify.purifier import Purified, facts
from robustify.report import write_report
from robustify.run_folder import RunFolder, locked
from robustify.settings import Training
from robustify.threat import Norm, ThreatModel, chosen
from robustify.tiers import extend
from robustify.train import Fitted, Stage
from robustify.weights import WEIGHTS_FILE

log = logging.getLogger(__name__)

AUTO = "auto"
AGAIN_AFTER = 1.0  # seconds after which a second Ctrl-C is a person's


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides what a run is; equal jobs are the same run."""

    recipe: config.Recipe
    student: str
    teachers: tuple[str, ...]
    dataset: DataSet
    threat: ThreatModel
    method: Mapping[str, Any]
    attack: Mapping[str, Any]
    training: Training
    seed: int
    suite: str
    limit: int | None
    max_steps: int | None
    precision: str
    sync_bn: bool
    find_batch_size: bool = False  # by trial, where the run has none yet
    compiled: bool = False
    profiled: bool = False

    def describe(self) -> dict[str, Any]:
        """What makes this run this run, as plain values: everything but how it is evaluated and
        how its work is done."""
        return {
            "recipe": self.recipe.name,
            "student": self.student,
            "teachers": list(self.teachers),
            "contents": local_contents(self.recipe.module, self.student, *self.teachers),
            "data": {
                "name": self.dataset.name,
                "fingerprint": self.dataset.fingerprint,
                "training_images": len(self.dataset.train),
            },
            "threat_model": {"norm": self.threat.norm, "eps": self.threat.eps},
            "method": dict(self.method),
            "attack": dict(self.attack),
            "training": vars(self.training),
            "seed": self.seed,
            "max_steps": self.max_steps,
            "precision": self.precision,
            "sync_bn": self.sync_bn,
        }


def plan(
    recipe: str,
    student: str,
    *,
    teachers: Sequence[str] = (),
    dataset: str = "digits",
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    norm: Norm | None = None,
    eps: float | None = None,
    seed: int = 0,
    suite: str = "fast",
    limit: int | None = None,
    max_steps: int | None = None,
    precision: str = "fp32",
    sync_bn: bool = False,
    image_size: int | None = None,
    train_limit: int | None = None,
    compiled: bool = False,
    profiled: bool = False,
) -> Job:
    """Check a request before anything long starts. `settings` overrides the recipe's YAML
    (`{"training.epochs": 5, "beta": 3}`); a batch size of "auto" is found by trial when the run
    starts. Raises `UsageError`, `DataError`."""
    found = config.find(recipe)
    settings = dict(settings or {})
    find = [k for k in ("batch_size", "training.batch_size") if settings.get(k) == AUTO]
    for key in find:
        del settings[key]
    usual = config.data_of(found, preset)
    image_size = image_size or usual.get("image_size")
    loaded = data.load(dataset, image_size=image_size)
    wanted = image_size or models.wanted_image_size(student, loaded.image_size)
    if wanted not in (None, loaded.image_size):
        log.info("%s wants images of %d pixels: resizing %s", student, wanted, loaded.name)
        loaded = data.load(dataset, image_size=wanted)
    if train_limit is not None:
        loaded = replace(loaded, train=loaded.train.take(train_limit))
    if "eps" in usual:
        loaded = replace(loaded, threat=ThreatModel(usual.get("norm", "Linf"), usual["eps"]))
    threat = chosen(norm, eps, loaded.threat)
    resolved = config.resolve(
        found,
        schemas_of(found),
        eps=threat.eps,
        preset=preset,
        data_name=loaded.name,
        settings=settings,
    )
    if precision not in ("fp32", "bf16"):
        raise UsageError(
            f"expected a precision of fp32 or bf16, got {precision!r}; fp16 is not offered because "
            "its gradients underflow in attacks"
        )
    return Job(
        recipe=found, student=student, teachers=tuple(teachers), dataset=loaded, threat=threat,
        method=resolved["method"], attack=resolved["attack"],
        training=Training(**resolved["training"]), seed=seed, suite=suite, limit=limit,
        max_steps=max_steps, precision=precision, sync_bn=sync_bn, find_batch_size=bool(find),
        compiled=compiled, profiled=profiled,
    )  # fmt: skip


def check_recipe(found: config.Recipe) -> list[str]:
    """The presets of a recipe; raises `UsageError` for the first setting that does not fit."""
    for preset in (None, *found.presets):
        config.data_of(found, preset)
        resolved = config.resolve(found, schemas_of(found), eps=8 / 255, preset=preset)
        Training(**resolved["training"])
    return list(found.presets)


def schemas_of(found: config.Recipe) -> dict[str, dict[str, Any]]:
    """What may be said in each section of a recipe: section -> name -> type."""
    stages = found.load().stages
    return {
        "method": config.schema(stages, without=("threat", "attack")),
        "attack": config.schema(pgd, without=("noise",)) if takes_attack(stages) else {},
        "training": config.schema(Training),
    }


def is_first_process() -> bool:
    """Whether this process owns the folder and the terminal."""
    return bool(this_process().is_main_process)


def takes_attack(stages: Any) -> bool:
    """Whether a recipe has an inner maximisation."""
    return "attack" in config.schema(stages)


def distill(
    recipe: str, student: str, *, out: Path | None = None, resume: bool = True, **options: Any
) -> Path:
    """`plan` and `run` in one: what `robustify distill` does. `options` are those of `plan`."""
    return run(plan(recipe, student, **options), out, resume=resume)


def run(job: Job, out: Path | None = None, *, resume: bool = True) -> Path:
    """Train the student by the recipe, evaluate it, and leave a run folder; returns its path.

    A folder that holds the same job is continued, or, if finished, left as it is. Under a launcher
    every process calls this, and the first one owns the folder. Raises what `RunFolder.held` and
    `fit` raise; KeyboardInterrupt after saving a checkpoint.
    """
    folder = RunFolder(out if out is not None else Path("runs") / name_of(job))
    if job.find_batch_size:
        with first_holds(locked(folder.path)):  # who holds it now holds it longer than a trial
            known = said(_batch_size(folder) if resume and is_first_process() else None)
            job = _of_batch_size(job, known) if known else sized(job)
    accelerator = new_accelerator(job.precision, job.training.accumulate, job.seed)
    with first_holds(folder.held(job.describe(), resume=resume)):
        evaluation = {"suite": job.suite, "limit": job.limit}
        record = said(folder.record if accelerator.is_main_process else None)
        if record.get("status") == "finished":
            if record.get("evaluation", evaluation) == evaluation:
                log.warning("%s is already finished; --no-resume trains it anew", folder.path)
                return folder.path
            log.warning("%s is already trained; evaluating it as asked now", folder.path)
        _leave(job, folder, _work(job, folder, accelerator), accelerator)
    return folder.path


def sized(job: Job) -> Job:
    """`job` with a batch size found by trial: the smallest that any of its stages finds."""

    def stages_of(objective: Objective) -> Callable[[int], Stage]:
        def new(batch_size: int) -> Stage:
            accelerator = new_accelerator(job.precision, job.training.accumulate, job.seed)
            copied, of_size = copy.deepcopy(objective), _of_batch_size(job, batch_size)
            return new_stage(of_size, copied, 0, accelerator, alone=True)

        return new

    with compiling(job.compiled):
        found = [find_batch_size(stages_of(objective)) for objective in objectives(job)]
    return _of_batch_size(job, min(found))


def _batch_size(folder: RunFolder) -> int | None:
    """That of the run in `folder`, if there is one."""
    size: int | None = folder.record.get("run", {}).get("training", {}).get("batch_size")
    return size


def _of_batch_size(job: Job, batch_size: int) -> Job:
    training = replace(job.training, batch_size=batch_size)
    return replace(job, training=training, find_batch_size=False)


def local_contents(*names: str) -> dict[str, str]:
    """SHA-256 of those that are files of this machine, or the weights of a folder: a run whose
    recipe or teacher changed under the same name is another run."""
    files = {name: Path(name) for name in names}
    weights = {name: path / WEIGHTS_FILE if path.is_dir() else path for name, path in files.items()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in weights.items()
        if path.is_file()
    }


def name_of(job: Job) -> str:
    """What a run's folder is called unless told otherwise."""
    return f"{job.recipe.name}-{Path(job.student).stem}-{job.dataset.name}"


def new_accelerator(precision: str, accumulate: int, seed: int) -> Accelerator:
    """Accelerate with a sampler that resumes exactly; `precision` is fp32 or bf16."""
    # Accelerate keeps one global state and refuses a second precision in one process.
    AcceleratorState._reset_state(True)
    return Accelerator(
        cpu=on_cpu(),
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )


def objectives(job: Job) -> Iterator[Objective]:
    """The recipe's stages, each built from its own seed so that a resumed run builds the same."""
    dataset = job.dataset
    fitted_to: dict[str, Any] = {
        "num_classes": dataset.num_classes, "in_chans": dataset.in_chans,
        "image_size": dataset.image_size, "class_names": dataset.class_names,
        "mean": dataset.mean, "std": dataset.std, "data": dataset.source,
    }  # fmt: skip
    torch.manual_seed(job.seed)
    student = models.adapt(job.student, **fitted_to)
    teachers = [
        # A bare architecture is to be trained by the recipe; anything else is a trained teacher.
        models.adapt(teacher, **fitted_to)
        if timm.is_model(teacher)
        else models.match_labels(models.load(teacher), dataset.class_names)
        for teacher in job.teachers
    ]
    stages = job.recipe.load().stages
    common = {"threat": job.threat, "attack": job.attack} if takes_attack(stages) else {}
    generator = stages(student, teachers, **common, **job.method)
    for number in itertools.count():
        torch.manual_seed(job.seed + 1 + number)
        objective = next(generator, None)
        if objective is None:
            return
        yield objective


def new_stage(
    job: Job, objective: Objective, number: int, accelerator: Accelerator, *, alone: bool = False
) -> Stage:
    """`objective` with this job's data and settings, and what the stage itself changes in them;
    `alone` as of `Stage`."""
    train, validation = job.dataset.split_validation()
    if job.sync_bn:
        objective = torch.nn.SyncBatchNorm.convert_sync_batchnorm(objective)  # type: ignore[no-untyped-call]
    return Stage(
        objective, train, validation, number=number, threat=job.threat, accelerator=accelerator,
        settings=Training(**{**vars(job.training), **objective.training_changes}), seed=job.seed,
        policy=job.dataset.policy, max_steps=job.max_steps, alone=alone,
    )  # fmt: skip


@dataclass(frozen=True)
class _Trained:
    """The last objective, what it left, one row per stage and one per epoch, and by their roles
    the classifiers that were trained or used on the way, other than the student."""

    objective: Objective
    fitted: Fitted
    outline: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    others: dict[str, Classifier]


def _work(job: Job, folder: RunFolder, accelerator: Accelerator) -> _Trained:
    """Train the stages one after the other; a finished stage is loaded instead."""
    last: Objective | None = None
    met: dict[Classifier, str] = {}
    fitted: Fitted | None = None
    outline: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    with interruptible() as interrupted, compiling(job.compiled):
        for number, objective in enumerate(objectives(job)):
            last = objective
            for role, network in _classifiers(objective):
                met.setdefault(network, role)
            stage = new_stage(job, objective, number, accelerator)
            before = list(rows)

            def on_epoch(history: list[dict[str, Any]], before: list[Any] = before) -> None:
                if accelerator.is_main_process:
                    lines = (json.dumps(row) for row in before + history)
                    folder.write("metrics.jsonl", "\n".join(lines) + "\n")

            profiled = job.profiled and accelerator.is_main_process
            name = f"stage{number}"
            with profiling(folder.path, name, wanted=profiled) as on_step:
                fitted = fit(stage, checkpoints=folder.checkpoints, interrupted=interrupted,
                             on_epoch=on_epoch, on_step=on_step)  # fmt: skip
            rows += fitted.history
            outline.append({"stage": objective.name, "network": objective.student.architecture,
                            "selection": fitted.selection,
                            "seconds": round(fitted.seconds, 1)})  # fmt: skip
    if last is None or fitted is None:
        raise UsageError(f"expected recipe {job.recipe.name} to yield at least one Objective")
    others = {role: network for network, role in met.items() if network is not last.student}
    return _Trained(last, fitted, outline, rows, others)


def _classifiers(objective: Objective) -> Iterator[tuple[str, Classifier]]:
    """The classifiers of a stage, by their roles: frozen ones, and the one it trains."""
    for role, module in objective.named_children():
        if isinstance(module, Frozen) and isinstance(module.network, Classifier):
            yield role, module.network
    yield objective.name, objective.student


def _leave(
    job: Job,
    folder: RunFolder,
    trained: _Trained,
    accelerator: Accelerator,
) -> None:
    """Weights, configuration, report and record."""
    fitted, outline, others = trained.fitted, trained.outline, trained.others
    record = dict(trained.objective.record)
    student = trained.objective.student.to("cpu").to(memory_format=torch.contiguous_format)
    student.about |= {
        "recipe": job.recipe.name, "threat_model": job.describe()["threat_model"],
        "data": job.dataset.source, "selection": fitted.selection, "record": record,
        "seed": job.seed,
    }  # fmt: skip
    if accelerator.is_main_process:
        models.save(student, folder.path)
    report = assess(student.to(accelerator.device), job.dataset, job.threat, suite=job.suite,
                    limit=job.limit, seed=job.seed, out=folder.path,
                    transfer_from=others if record.get("defenses") else None)  # fmt: skip
    if not accelerator.is_main_process:
        return
    training = {
        **job.describe(),
        "selection": fitted.selection,
        "stages": outline,
        "record": record,
    }
    seconds = round(sum(row["seconds"] for row in outline), 1)
    more: dict[str, Any] = {"notices": record.get("notices", ()), "selection": fitted.selection,
            "course": course.sampled(trained.rows),
            "cost": {"training seconds": seconds},
            **masking(student, job.dataset, report), **shown(report, job.dataset)}  # fmt: skip
    described: dict[str, Any] = {**models.describe(student),
                                 "weights_hash": models.weights_hash(student)}  # fmt: skip
    if isinstance(student, Purified):
        described |= facts(student)
        surrogate = next((n for n in reversed(others.values()) if isinstance(n, Purified)), None)
        report, more = extend(report, student, job.dataset, more=more,
                              surrogate=surrogate and surrogate.eval())  # fmt: skip
        folder.update(**facts(student))
    write_report(folder.path, report, model=described, data=job.dataset, training=training,
                 more=more)  # fmt: skip
    folder.update(
        status="finished",
        evaluation={"suite": job.suite, "limit": job.limit},
        selection=fitted.selection,
        stages=outline,
        record=record,
        training_seconds=seconds,
        versions=versions(),
    )


@contextmanager
def interruptible() -> Iterator[Any]:
    """Turn the first SIGINT or SIGTERM into a question to be asked, at the latest at the end of the
    block, where it raises KeyboardInterrupt in all processes; a second SIGINT is obeyed.

    Not a second SIGTERM, nor a SIGINT within a second: launchers and schedulers repeat each other.
    """
    received: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not received:
            log.warning("finishing this step and saving; Ctrl-C again to stop at once")
        elif number == signal.SIGINT and now - received[0] > AGAIN_AFTER:
            raise KeyboardInterrupt
        received.append(now)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever owns the signals keeps them
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if agreed(lambda: bool(received))():  # after the last question
        raise KeyboardInterrupt
