"""Model passes: how much work an attack was, in a unit that no machine changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Passes:
    """Images sent forward through the model, and images a gradient was computed for."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Forward plus backward."""
        return self.forward + self.backward

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)
