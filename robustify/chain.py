"""A chain of networks: each is trained by the one before it, and teaches the next."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustify.frozen import Frozen
from robustify.links import scale_logits
from robustify.models import Classifier
from robustify.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Chain:
    """`teacher`, assistants of the architectures `names`, `student`.

    `new` makes a network of an architecture, `link` the stage that trains one; a network that is
    trained has its logits multiplied by `factor`.
    """

    teacher: Classifier
    student: Classifier
    names: Sequence[str]
    new: Callable[[str], Classifier]
    link: Callable[..., Objective]
    factor: float = 1.0

    def controls(self) -> Iterator[Objective]:
        """A student without assistants that trains as long as the whole chain: what assistants gain
        must be more than equal compute gains. Without assistants there is nothing to compare."""
        if not self.names:
            return
        control, trainings = self.new(self.student.architecture), len(self.names) + 1
        for number in range(1, trainings + 1):
            name = f"control without assistants, training {number} of {trainings}"
            yield self.link(student=control, teacher=Frozen(self.teacher), name=name)

    def stages(self, record: Mapping[str, Any]) -> Iterator[Objective]:
        """The assistants and the student, with `record` about each."""
        teacher = self.teacher
        networks = itertools.chain(map(self.new, self.names), [self.student])
        for number, network in enumerate(networks, 1):
            name = "student" if network is self.student else f"assistant {number}"
            yield self.link(student=network, teacher=Frozen(teacher), name=name, record=record)
            scale_logits(network, self.factor)
            teacher = network
