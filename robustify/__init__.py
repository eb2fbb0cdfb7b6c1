"""Robust image classifiers: distil, evaluate, report.

    robustify.distill(recipe, student, …) -> run folder      robustify.load(name) -> Classifier
    robustify.evaluate(model, images, labels, …) -> Report    robustify.attack(model, images, …)
    robustify.attach(purifier, classifier, out) -> folder

Names are imported when they are first used: `import robustify` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustify.attachment import attach
    from robustify.attacks.craft import attack
    from robustify.classifier import Classifier
    from robustify.evaluation import Report, evaluate
    from robustify.harden import distill
    from robustify.models import load
    from robustify.threat import ThreatModel

__version__ = "0.1.0"

__all__ = ["Classifier", "Report", "ThreatModel", "attach", "attack", "distill", "evaluate", "load"]

_HOMES = {
    "Classifier": "classifier",
    "Report": "evaluation",
    "ThreatModel": "threat",
    "attach": "attachment",
    "attack": "attacks.craft",
    "distill": "harden",
    "evaluate": "evaluation",
    "load": "models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robustify' has no attribute {name!r}")
    return getattr(importlib.import_module(f"robustify.{_HOMES[name]}"), name)
