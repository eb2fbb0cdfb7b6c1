"""Teacher assistants: a chain teacher -> assistants -> student, each learning from the one before
(Mandal and Gao, "Improving defensive distillation using teacher assistant", 2023, arXiv
2305.08076).

paper   L_0 = CE(y, p_T(z_0)),  L_i = CE(sg p_T(z_{i-1}), p_T(z_i));  every stage starts at W0, the
        weights after one epoch at T = 1; after L_0 no hard labels, no T²; served without the T
takd    L_i = (1 - soft_weight) · CE(y, p(z_i)) + soft_weight · T² · KL(sg p_T(z_{i-1}), p_T(z_i)),
        L_0 = CE(y, p(z_0)), capacity descending (Mirzadeh et al., AAAI 2020, arXiv 1902.03393)
robust  x* = argmax over the ball of KL(q, p(z_i(x'))),   q = p_tau(z_{i-1}(x)),   z_0 robust
        L_i = adv_weight · KL(q, p(z_i(x*))) + clean_weight · KL(q, p(z_i(x)))

z_i are the logits of network i, p_T(z) = softmax(z / T), p = p_1, sg stops the gradient. The losses
are in `robustify.links`, which logs KL for CE: they differ by a constant. `paper` is defensive
distillation (Papernot et al., 2016), which masks gradients and makes nothing robust (Carlini and
Wagner, 2017); its reports say so. Training z at T is training z / T at 1, because the last layer
can take up any factor: `folded` does that, and multiplies the last layer by T when a stage ends;
`plain` trains at T, as published, for which SGD needs many steps.

Certain, from the official program: `paper`, one architecture throughout; its own networks and its
decay of 1e-6 per step are not here. Certain: TAKD's loss (here per image; officially 1 / K of it),
the links of RSLAD and ARD. Inferred: that T changes no decision. Our choice: `robust`, in which
only the teacher's temperature tau varies (LTD's rule, arXiv 2111.02331), every default T and length
of the chain, `folded`, `controls`. No table of the paper could be read.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from robustify import capacity
from robustify.chain import Chain
from robustify.errors import UsageError
from robustify.frozen import weights_hash
from robustify.links import (
    RobustLink,
    SoftLabels,
    Tempered,
    check_same,
    check_temperature,
    scale_logits,
)
from robustify.models import Classifier, like
from robustify.objective import Objective, check_teachers, is_from_scratch
from robustify.recipes.pgd_at import robust_teacher
from robustify.recipes.standard import standard_teacher
from robustify.threat import ThreatModel

log = logging.getLogger(__name__)

NOTICE = (
    "Defensive distillation is known to be broken (Carlini and Wagner 2017). "
    "This recipe is for reproduction and education."
)
TEMPERATURES = {"paper": 20.0, "takd": 5.0, "robust": 1.0}
ONE_EPOCH = {"epochs": 1, "decay_at": (), "warmup_epochs": 0, "averaging": "none"}
LAST_WEIGHTS = {"evaluate_from": 0.9999}  # evaluated in the last epoch alone, which so is the best
NOT_AUGMENTED = {"augmentation": "none"}


def stages(
    student: Classifier,
    teachers: Sequence[Classifier],
    *,
    threat: ThreatModel,
    attack: Mapping[str, Any],
    mode: Literal["paper", "takd", "robust"] | None = None,
    robust: bool = False,
    assistants: int | Sequence[str] | None = None,
    controls: bool = True,
    temperature: float | None = None,
    temperature_training: Literal["folded", "plain"] = "folded",
    teacher_mode: Literal["tempered", "frozen"] = "tempered",
    soft_labels: Literal["offline", "online"] = "offline",
    shared_init: bool = True,
    soft_weight: float = 0.5,
    teacher_temperature: float = 1.0,
    link: Literal["rslad", "ard"] = "rslad",
    adv_weight: float = 5 / 60,
    clean_weight: float = 1 / 60,
) -> Iterator[Objective]:
    """The teacher unless it comes trained, controls, the assistants, the student.

    `mode` is paper by default; `robust=true` stands for mode robust. `assistants` are named or
    counted: copies of the student in paper, else chosen by capacity; by default 1, in robust 0.
    `controls` adds to any assistants a student without them that trains as long as the chain. T is
    20 in paper, 5 in takd.

    paper: `teacher_mode` tempered trains or fine-tunes the teacher at T; frozen takes it as it is,
    which is ordinary distillation. Offline `soft_labels` are read once; training then does not
    augment. robust: link ard attacks labels and has one term, 900 / K at both temperatures 30.
    """
    check_teachers(student, teachers, roles=1)
    if robust and mode not in (None, "robust"):
        raise UsageError(f"expected robust=true with mode robust or none, got mode {mode}")
    mode = mode or ("robust" if robust else "paper")
    at = TEMPERATURES[mode] if temperature is None else temperature
    check_temperature(at)
    wanted = assistants if assistants is not None else int(mode != "robust")
    masks = mode == "paper"
    record = {"mode": mode, "temperature": at, "notices": [NOTICE] if masks else [],
              "defenses": ["defensive distillation"] if masks else []}  # fmt: skip
    if mode == "paper":
        links = _paper(
            student, teachers, wanted, record, at=at, folded=temperature_training == "folded",
            tempered=teacher_mode == "tempered", offline=soft_labels == "offline",
            shared_init=shared_init,
        )  # fmt: skip
    elif mode == "takd":
        links = _takd(student, teachers, wanted, at=at, soft_weight=soft_weight)
    else:
        links = _robust(
            student, teachers, wanted, link, threat=threat, attack=attack,
            teacher_temperature=teacher_temperature, adv_weight=adv_weight,
            clean_weight=clean_weight,
        )  # fmt: skip
    chain = yield from links
    if controls:
        yield from chain.controls()
    yield from chain.stages(record)


def _paper(
    student: Classifier,
    teachers: Sequence[Classifier],
    wanted: int | Sequence[str],
    record: dict[str, Any],
    *,
    at: float,
    folded: bool,
    tempered: bool,
    offline: bool,
    shared_init: bool,
) -> Generator[Objective, None, Chain]:
    """W0, then z_0 by L_0; the links L_i to come."""
    log.warning(NOTICE)
    changes = {**LAST_WEIGHTS, **(NOT_AUGMENTED if offline else {})}
    names = [student.architecture] * wanted if isinstance(wanted, int) else wanted
    new: Callable[[str], Classifier] = partial(like, student)
    if shared_init:
        check_same(student.architecture, names)
        yield Tempered(student=student, name="initial weights", temperature=1.0,
                       training_changes={**changes, **ONE_EPOCH})  # fmt: skip
        record["initial_weights"] = weights_hash(student.module)
        new = partial(_again, copy.deepcopy(student))
    teacher = teachers[0] if teachers else new(student.architecture)
    if tempered or is_from_scratch(teacher):
        hot = at if tempered else 1.0
        yield Tempered(student=teacher, name="teacher", temperature=1.0 if folded else hot,
                       training_changes=changes)  # fmt: skip
        scale_logits(teacher, hot if folded else 1.0)
    link = partial(
        SoftLabels, label_temperature=at, temperature=1.0 if folded else at, hard_weight=0.0,
        soft_weight=1.0, offline=offline, training_changes=changes,
    )  # fmt: skip
    return Chain(teacher=teacher, student=student, names=names, new=new, link=link,
                 factor=at if folded else 1.0)  # fmt: skip


def _takd(
    student: Classifier,
    teachers: Sequence[Classifier],
    wanted: int | Sequence[str],
    *,
    at: float,
    soft_weight: float,
) -> Generator[Objective, None, Chain]:
    """z_0 by L_0, where it is not given; the links L_i to come."""
    larger = capacity.above(capacity.parameters(student.module), student.num_classes)
    teacher = yield from standard_teacher(student, teachers, architecture=larger)
    link = partial(
        SoftLabels, label_temperature=at, temperature=at, hard_weight=1 - soft_weight,
        offline=False, soft_weight=soft_weight * at**2, training_changes={"select": "clean"},
    )  # fmt: skip
    return Chain(teacher=teacher, student=student, new=partial(like, student), link=link,
                 names=capacity.descending(teacher, student, wanted))  # fmt: skip


def _robust(
    student: Classifier,
    teachers: Sequence[Classifier],
    wanted: int | Sequence[str],
    link: Literal["rslad", "ard"],
    *,
    threat: ThreatModel,
    attack: Mapping[str, Any],
    **weights: float,
) -> Generator[Objective, None, Chain]:
    """z_0 by PGD-AT, where it is not given; the links L_i to come."""
    larger = capacity.above(capacity.parameters(student.module), student.num_classes)
    teacher = yield from robust_teacher(
        student, teachers, architecture=larger, threat=threat, attack=attack
    )
    settings: dict[str, Any] = {"attack_target": "teacher", "temperature": 1.0, **weights}
    if link == "ard":
        settings = {"attack_target": "label", "temperature": 30.0, "teacher_temperature": 30.0,
                    "adv_weight": 900 / student.num_classes, "clean_weight": 0.0}  # fmt: skip
    return Chain(teacher=teacher, student=student, new=partial(like, student),
                 link=partial(RobustLink, threat=threat, attack=attack, **settings),
                 names=capacity.descending(teacher, student, wanted))  # fmt: skip


def _again(network: Classifier, architecture: str) -> Classifier:
    """`network` once more, whatever the name: every stage starts from the same weights."""
    return copy.deepcopy(network)
