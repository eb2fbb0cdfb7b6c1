"""Recipes as people write them: YAML and `--set` in, checked keyword arguments out.

A signature is a schema: the keyword-only parameters of a recipe's `stages`, of `pgd` and of
`Training` define what may be said; anything else is an error with a suggestion. YAML holds plain
values and can never name code. `presets.yaml` beside this module holds the presets that every
recipe has.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from robustify.errors import UsageError, suggest

SECTIONS = ("method", "attack", "training")
NORM = Literal["Linf", "L2", "L1"]  # `threat.Norm`, without importing torch for it
DATA = {"image_size": int, "norm": NORM, "eps": float}  # what a preset may say about the data
COMMON = Path(__file__).with_name("presets.yaml")
ABOUT = {  # what a recipe says of itself, in text, and what is shown where it does not
    "idea": "not said",
    "paper": "not said",
    "cost": "not said",  # per step, in student forwards
    "teachers": "not said",  # which it takes, robust or standard
    "measured": "not measured",  # with student, data, attack, eps, n and seeds
}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?(/\d+\.?\d*)?")
_EPS = re.compile(r"eps(?:\s*([*/])\s*(\d+\.?\d*))?")


@dataclass(frozen=True)
class Recipe:
    """A recipe's YAML file: what it is, its settings by section, and its named presets."""

    name: str
    path: Path | None
    module: str  # an installed module's name, or the path of a Python file
    about: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def card(self) -> dict[str, str]:
        """The recipe as people read it: its name, and every entry of `ABOUT`."""
        return {"name": self.name, **ABOUT, **self.about}

    def load(self) -> types.ModuleType:
        """Import the recipe's Python module."""
        if not self.module.endswith(".py"):
            return importlib.import_module(self.module)
        name = f"robustify.recipes.by_path.{Path(self.module).stem}"
        spec = importlib.util.spec_from_file_location(name, self.module)
        if spec is None or spec.loader is None:
            raise UsageError(f"expected a Python file with a recipe, got {self.module}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever somebody's own file raises
            del sys.modules[spec.name]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(
                f"expected {self.module} to be a Python file that can be imported, but {reason}; "
                "--debug shows where"
            ) from error
        if not inspect.isgeneratorfunction(getattr(module, "stages", None)):
            raise UsageError(
                f"expected {self.module} to define `stages(student, teachers, *, …)` that yields "
                "Objectives; see the recipes in robustify/recipes"
            )
        return module


def folders() -> tuple[Path, Path]:
    """Where the recipes' Python files are, and where their YAML files are: beside them once
    installed, at the top of the repository in a checkout."""
    code = Path(__file__).parent / "recipes"
    checkout = Path(__file__).parent.parent / "recipes"
    return code, code if any(code.glob("*.yaml")) else checkout


def names() -> list[str]:
    """The recipes that ship with robustify."""
    code, _ = folders()
    return sorted(path.stem for path in code.glob("*.py") if path.stem != "__init__")


def find(name_or_path: str) -> Recipe:
    """A recipe by name, a YAML file (its `recipe:` says which method), or a Python file of one's
    own, whose settings may stand in a YAML file of the same name beside it.

    Raises `UsageError` for an unknown name, a missing file, and a file that is not as described.
    """
    path = Path(name_or_path)
    if path.suffix == ".py":
        if not path.is_file():
            raise UsageError(f"expected a recipe, but there is no file {path}")
        settings = path.with_suffix(".yaml")
        return _read(settings if settings.is_file() else None, path.stem, str(path))
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path)
    if name_or_path not in names():
        raise UsageError(
            f"expected a recipe of {', '.join(names())}, or a .yaml or .py file, got "
            f"{name_or_path!r}{suggest(name_or_path, names())}"
        )
    _, settings_folder = folders()
    return _read(
        settings_folder / f"{name_or_path}.yaml", name_or_path, f"robustify.recipes.{name_or_path}"
    )


def _from_yaml(path: Path) -> Recipe:
    if not path.is_file():
        raise UsageError(f"expected a recipe, but there is no file {path}")
    name = _mapping(path).get("recipe", path.stem)
    if name in names():
        return _read(path, name, f"robustify.recipes.{name}")
    if path.with_suffix(".py").is_file():
        return _read(path, path.stem, str(path.with_suffix(".py")))
    raise UsageError(
        f"expected {path} to say `recipe: NAME` with one of {', '.join(names())}, or a Python file "
        f"of the same name beside it; got {name!r}{suggest(str(name), names())}"
    )


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"expected {path} to be readable YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(content, dict):
        raise UsageError(f"expected {path} to hold a mapping, got {type(content).__name__}")
    return content


def _read(path: Path | None, name: str, module: str) -> Recipe:
    content = _mapping(path) if path else {}
    known = ("recipe", "about", "presets", *SECTIONS)
    for key in content:
        if key not in known:
            raise UsageError(
                f"{path}: expected sections {', '.join(known)}, got {key!r}"
                + suggest(str(key), known)
            )
    about = _entries(path, "about", content.get("about"))
    for key, value in about.items():
        if key not in ABOUT or not isinstance(value, str):
            raise UsageError(
                f"{path}: expected text about {', '.join(ABOUT)}, got {key}: {value!r}"
                + suggest(str(key), ABOUT)
            )
    sections = {key: _entries(path, key, content.get(key)) for key in SECTIONS}
    own = _entries(path, "presets", content.get("presets"))
    presets = {preset: _preset(path, preset, changes) for preset, changes in own.items()}
    for preset, common in common_presets().items():
        mine = presets.get(preset, {})
        presets[preset] = {k: {**common.get(k, {}), **mine.get(k, {})} for k in common | mine}
    return Recipe(name, path, module, about, sections, presets)


@functools.cache
def common_presets() -> dict[str, dict[str, dict[str, Any]]]:
    """The presets that every recipe has, by name and section."""
    return {name: _preset(COMMON, name, changes) for name, changes in _mapping(COMMON).items()}


def _preset(path: Path | None, preset: str, changes: Any) -> dict[str, dict[str, Any]]:
    """What one preset says, by section."""
    sections = _entries(path, f"presets.{preset}", changes)
    known = (*SECTIONS, "data")
    for key in sections:
        if key not in known:
            raise UsageError(
                f"{path}: expected sections {', '.join(known)} in presets.{preset}, got {key!r}"
                + suggest(key, known)
            )
    return {key: _entries(path, f"presets.{preset}.{key}", sections[key]) for key in sections}


def _entries(path: Path | None, place: str, value: Any) -> dict[str, Any]:
    """A mapping in a recipe's YAML, its keys as text; empty where nothing stands."""
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"{path}: expected {place} to be a mapping, got {value!r}")
    return {str(key): entry for key, entry in (value or {}).items()}


def overrides(pairs: typing.Iterable[str]) -> dict[str, Any]:
    """`["training.lr=0.05", "beta=3"]` as a mapping with values read as YAML."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"expected --set key=value, got {pair!r}")
        try:
            result[key.strip()] = yaml.safe_load(value) if value else None
        except yaml.YAMLError:
            raise UsageError(f"expected a plain value after {key}=, got {value!r}") from None
    return result


def resolve(
    recipe: Recipe,
    schemas: Mapping[str, Mapping[str, Any]],
    *,
    eps: float,
    preset: str | None = None,
    data_name: str = "",
    settings: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """The settings of each section: file, then preset, then `settings` (keys `section.name`, or a
    bare name that only one section has), checked against `schemas` (section -> name -> type).

    Without `preset`, a preset named like the data set applies. Raises `UsageError` with the nearest
    known name for anything unknown or of the wrong type.
    """
    chosen = _chosen(recipe, preset) if preset else recipe.presets.get(data_name, {})
    resolved: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        values = {**recipe.sections.get(section, {}), **chosen.get(section, {})}
        if not schemas[section] and preset in common_presets():
            values = {}  # the attack of a recipe that has none
        for key, value in values.items():
            _require(f"{section}.{key}", schemas)
            values[key] = _value(f"{section}.{key}", value, schemas[section][key], eps)
        resolved[section] = values
    for key, value in (settings or {}).items():
        section, name = _require(key, schemas)
        resolved[section][name] = _value(key, value, schemas[section][name], eps)
    return resolved


def data_of(recipe: Recipe, preset: str | None) -> dict[str, Any]:
    """What a preset says about the data: `image_size` in pixels, `norm` and `eps`, where it does.
    Raises `UsageError` as `resolve`."""
    said = _chosen(recipe, preset).get("data", {}) if preset else {}
    found = {}
    for key, value in said.items():
        _require(f"data.{key}", {"data": DATA})
        found[key] = _value(f"data.{key}", value, DATA[key], eps=0.0)
    return found


def _chosen(recipe: Recipe, preset: str) -> Mapping[str, Mapping[str, Any]]:
    if preset not in recipe.presets:
        raise UsageError(
            f"expected a preset of {', '.join(recipe.presets)} for {recipe.name}, got {preset!r}"
            + suggest(preset, recipe.presets)
        )
    return recipe.presets[preset]


def schema(target: Callable[..., Any], *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Name -> annotation of the keyword-only parameters of `target`, Any where there is none."""
    hints = typing.get_type_hints(target)
    parameters = inspect.signature(target).parameters.values()
    return {
        p.name: hints.get(p.name, Any)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in without
    }


def _require(key: str, schemas: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """(section, name) of a setting, or an error with a suggestion."""
    section, dot, name = key.partition(".")
    known = [f"{s}.{n}" for s in schemas for n in schemas[s]]
    if dot and name in schemas.get(section, {}):
        return section, name
    homes = [s for s in schemas if key in schemas[s]]
    if len(homes) == 1:
        return homes[0], key
    bare = [full.partition(".")[2] for full in known]
    near = suggest(key, known) or suggest(key, bare) or suggest(name, bare)
    raise UsageError(f"unknown setting {key!r}{near or '; known: ' + ', '.join(known)}")


def _value(key: str, value: Any, annotation: Any, eps: float) -> Any:
    """`value` as the annotation wants it; `8/255` and `1e-3` are numbers, `eps/4` is relative."""
    if isinstance(value, str):
        try:
            value = _number(value.strip(), eps)
        except ZeroDivisionError:
            raise UsageError(f"expected {key} to be a number, got {value!r}") from None
    fitted = _fit(value, annotation)
    if fitted is _MISFIT:
        wanted = _wanted(annotation)
        raise UsageError(f"expected {key} to be {wanted}, got {value!r}")
    return fitted


def _wanted(annotation: Any) -> str:
    """A type in words: the choices of a Literal, the name of anything else."""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, options))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if o is type(None) else _wanted(o) for o in options)
    return getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")


def _number(text: str, eps: float) -> float | str:
    """The number that `text` writes, or `text`. Raises ZeroDivisionError for `1/0`."""
    if relative := _EPS.fullmatch(text):
        factor = float(relative[2] or 1)
        return eps * factor if relative[1] == "*" else eps / factor
    if _NUMBER.fullmatch(text):
        numerator, _, denominator = text.partition("/")
        return float(numerator) / float(denominator or 1)
    return text


_MISFIT = object()


def _fit(value: Any, annotation: Any) -> Any:
    """`value` converted to `annotation` where nothing is lost, else `_MISFIT`."""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin is typing.Literal:
        return value if value in options else _MISFIT
    if origin in (typing.Union, types.UnionType):
        return next((f for o in options if (f := _fit(value, o)) is not _MISFIT), _MISFIT)
    if origin is not None and issubclass(origin, (list, tuple, typing.Sequence)):
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        fitted = [_fit(item, options[0]) for item in items]
        return _MISFIT if _MISFIT in fitted else tuple(fitted)
    if annotation in (None, type(None)):
        return value if value is None else _MISFIT
    if annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)
    exact = isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))
    return value if exact else _MISFIT
