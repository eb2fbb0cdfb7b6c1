"""Robust image classifiers: distil, evaluate, report.

    robustify.distill(recipe, student, …) -> run folder      robustify.load(name) -> Classifier
    robustify.evaluate(model, images, labels, …) -> Report    robustify.attack(model, images, …)
    robustify.attach(purifier, classifier, out) -> folder     robustify.push(folder, "user/repo")

Names are imported when they are first used: `import robustify` costs nothing. Once timm is imported
too, before or after, `timm.create_model` also builds the networks of `robustify.networks`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustify.attachment import attach
    from robustify.attacks.craft import attack
    from robustify.classifier import Classifier
    from robustify.evaluation import Report, evaluate
    from robustify.harden import distill
    from robustify.hub import push
    from robustify.models import load
    from robustify.threat import ThreatModel

__version__ = "0.1.0"

__all__ = [
    "Classifier", "Report", "ThreatModel", "attach", "attack", "distill", "evaluate", "load",
    "push",
]  # fmt: skip

_HOMES = {
    "Classifier": "classifier",
    "Report": "evaluation",
    "ThreatModel": "threat",
    "attach": "attachment",
    "attack": "attacks.craft",
    "distill": "harden",
    "evaluate": "evaluation",
    "load": "models",
    "push": "hub",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robustify' has no attribute {name!r}")
    return getattr(importlib.import_module(f"robustify.{_HOMES[name]}"), name)


class _WithTimm(importlib.abc.MetaPathFinder):
    """Imports `robustify.networks` right after timm, and so never imports timm itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (other.find_spec(name, path, target) for other in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("robustify.networks")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module("robustify.networks")
else:
    sys.meta_path.insert(0, _WithTimm())
