"""What report.json holds, and whether a given one can be believed to be one.

Accuracies are fractions of all n images; intervals are 95 % Wilson, `[low, high]`. Required keys:

    schema            1
    threat_model      {norm, eps, eps_text}
    suite, seed, n
    clean_accuracy, clean_interval, robust_accuracy, interval
    verdict           {status: "reliable" | "suspect" | "not applicable", reasons: [sentence]}, and
                      notes [sentence] and title, a warning for the head, where there are any
    attacks           [{name, robust_accuracy, interval, settings: {…}}], cumulative worst case, in
                      the order they ran; and where known: alone (accuracy under this attack only,
                      null if it saw survivors only), newly_broken (images), queries (per image),
                      passes {forward, backward} (per evaluated image)
    model             {architecture, …}: parameters, weights_hash, image_size, mean, std, …
    data              {name, split, fingerprint, class_names}
    training          the resolved settings, with recipe and teachers; or null

Optional keys, shown when present:

    defenses          ["defensive distillation", "purifier"], either or both; the first demands
                      `side_by_side` where an image is right and eps > 0, the second a row of
                      tier W in `tiers`
    side_by_side      rows, at least one of tier "naive" and one of tier "adaptive"
    tiers             rows, one per attacker tier that was run: G0, G1, G2, W, Q
        a row         {tier, name, description, robust_accuracy, interval, headline: bool}; and n
                      if measured on fewer images. A tier G0, G1 or G2 demands a tier W.
    flags             [{name: "F1", title, raised: true | false | null, value, threshold,
                      sentence}]; null is a check that was not run; `counts: false`
                      one that was raised and does not decide the verdict
    curve             [{eps, eps_text, robust_accuracy, interval, attack}]
    classes           [{name, n, clean_accuracy, robust_accuracy}]
    gallery           [{index, label, prediction, prediction_adv, attack, factor, image, image_adv,
                      delta}], class names and PNG data URIs, as `robustify.gallery` makes them
    before            {name, clean_accuracy}, optionally robust_accuracy: the model undefended
    sensitivity       {n, n_right, temperature, s1, s2, s2_over_temperature, s3}: what
                      `robustify.sensitivity` measures, S1 by the temperature it was read at
    distances         {attack, norm, mean, median, success_rate}: smallest perturbations found
    reference         {name, clean_accuracy, robust_accuracy, source}, or "no reference row"
    passes            {forward, backward}: model passes per evaluated image, everything included
    selection         how the checkpoint was selected: a sentence or {…}
    notices           [sentence] that the method demands
    course            [{stage, epoch, term: number, …}], some epochs of each stage of training
    seconds           of the evaluation
    cost, versions    {name: value}
    command           what to type to repeat this
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NoReturn

from robustify.errors import RunFolderError

SCHEMA = 1
REQUIRED = (
    "threat_model", "suite", "seed", "n", "clean_accuracy", "clean_interval", "robust_accuracy",
    "interval", "verdict", "attacks", "model", "data",
)  # fmt: skip
INSIDE = {
    "threat_model": ("norm", "eps", "eps_text"),
    "verdict": ("status", "reasons"),
    "model": ("architecture",),
    "data": ("name", "split", "fingerprint", "class_names"),
}
ROWS = {
    "attacks": ("name", "robust_accuracy", "interval", "settings"),
    "side_by_side": ("tier", "name", "description", "robust_accuracy", "interval", "headline"),
    "tiers": ("tier", "name", "description", "robust_accuracy", "interval", "headline"),
    "flags": ("name", "title", "raised", "value", "threshold", "sentence"),
    "course": ("stage", "epoch"),
    "curve": ("eps", "eps_text", "robust_accuracy", "interval", "attack"),
    "classes": ("name", "n", "clean_accuracy", "robust_accuracy"),
    "gallery": ("index", "label", "prediction", "prediction_adv", "attack", "factor", "image",
                "image_adv", "delta"),
}  # fmt: skip
STATUSES = ("reliable", "suspect", "not applicable")
PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")
ROUNDING = 1e-6  # a float32 mean is up to 6e-8 off; Wilson bounds at 0 and 1 are as far


def validate(content: Any) -> None:
    """Raise `RunFolderError`, in one line, unless `content` is a report of this schema whose
    numbers are possible and whose defenses come with the rows they demand."""
    if not isinstance(content, Mapping) or "schema" not in content:
        _refuse("an object with a schema", type(content).__name__)
    if content["schema"] != SCHEMA:
        _refuse(f"schema {SCHEMA}", f"{content['schema']!r}; use the robustify that wrote it")
    _check_keys(content)
    _check_accuracies(content)
    _check_attacks(content)
    _check_rows(content)
    _check_course(content)
    _check_classes(content)
    _check_gallery(content)
    _check_defenses(content)


def _refuse(expected: str, got: str) -> NoReturn:
    raise RunFolderError(f"expected a report.json with {expected}, got {got}")


def _check_keys(content: Mapping[str, Any]) -> None:
    _need(content, REQUIRED, "")
    for key, inside in INSIDE.items():
        _need(content[key], inside, f"{key}.")
    for key, inside in ROWS.items():
        rows = content.get(key) or ()
        if not isinstance(rows, list | tuple):
            _refuse(f"a list under {key}", type(rows).__name__)
        for number, row in enumerate(rows):
            _need(row, inside, f"{key}[{number}].")
    if not isinstance(content["data"]["fingerprint"], str):
        _refuse("a fingerprint of the data", repr(content["data"]["fingerprint"]))
    if content["verdict"]["status"] not in STATUSES:
        _refuse(f"a verdict of {', '.join(STATUSES)}", repr(content["verdict"]["status"]))


def _need(value: Any, keys: Iterable[str], where: str) -> None:
    if not isinstance(value, Mapping):
        _refuse(f"an object under {where.rstrip('.')}", type(value).__name__)
    if missing := [where + key for key in keys if key not in value]:
        _refuse(", ".join(missing), "a report without")


def _check_accuracies(content: Mapping[str, Any]) -> None:
    n, eps = content["n"], content["threat_model"]["eps"]
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        _refuse("n >= 1 images", repr(n))
    if not _is_number(eps) or eps < 0:
        _refuse("eps >= 0", repr(eps))
    _check_accuracy(content["clean_accuracy"], content["clean_interval"], n, "clean_accuracy")
    _check_accuracy(content["robust_accuracy"], content["interval"], n, "robust_accuracy")
    if content["robust_accuracy"] > content["clean_accuracy"] + ROUNDING:
        _refuse("robust_accuracy <= clean_accuracy",
                f"{content['robust_accuracy']} > {content['clean_accuracy']}")  # fmt: skip


def _check_accuracy(value: Any, bounds: Any, n: int | None, where: str) -> None:
    """A fraction of n images, inside its interval; `bounds` or `n` of None are not looked at."""
    if not _is_number(value) or not 0 <= value <= 1:
        _refuse(f"{where} in [0, 1]", repr(value))
    if n is not None and abs(value * n - round(value * n)) > 0.01:
        _refuse(f"{where} to be a number of {n} images", f"{value} of them")
    if bounds is None:
        return
    if not isinstance(bounds, list | tuple) or len(bounds) != 2 or not all(map(_is_number, bounds)):
        _refuse(f"an interval [low, high] beside {where}", repr(bounds))
    low, high = bounds
    if not 0 <= low <= value + ROUNDING or not value - ROUNDING <= high <= 1:
        _refuse(f"{where} inside its interval", f"{value} and {list(bounds)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_attacks(content: Mapping[str, Any]) -> None:
    n = content["n"]
    if not content["attacks"]:
        _refuse("at least one attack", "none")
    for attack in content["attacks"]:
        where = f"robust_accuracy of {attack['name']!r}"
        _check_accuracy(attack["robust_accuracy"], attack["interval"], n, where)
        if attack.get("alone") is not None:
            _check_accuracy(attack["alone"], None, n, f"alone of {attack['name']!r}")
            if attack["alone"] < attack["robust_accuracy"] - ROUNDING:
                _refuse(f"alone of {attack['name']!r} >= the worst case", str(attack["alone"]))
    found = [attack["robust_accuracy"] for attack in content["attacks"]]
    after = [content["clean_accuracy"], *found, content["robust_accuracy"]]
    if any(later > earlier + ROUNDING for earlier, later in pairwise(after)):
        _refuse("accuracies that fall from clean over the attacks to robust_accuracy", str(after))
    for attack, (earlier, later) in zip(content["attacks"], pairwise(after[:-1]), strict=True):
        broken = attack.get("newly_broken")
        if broken is not None and broken != round((earlier - later) * n):
            _refuse(f"newly_broken of {attack['name']!r} = {round((earlier - later) * n)}",
                    repr(broken))  # fmt: skip


def _check_rows(content: Mapping[str, Any]) -> None:
    """Tiers, naive against adaptive, and the curve: possible, and no row below the worst case."""
    for key in ("tiers", "side_by_side"):
        for row in content.get(key) or ():
            where, n = f"{key} {row['name']!r}", row.get("n", content["n"])
            _check_accuracy(row["robust_accuracy"], row["interval"], n, where)
            lowest = content["robust_accuracy"] if n == content["n"] else 0
            if row["robust_accuracy"] < lowest - ROUNDING:
                _refuse(f"{where} >= the worst case over everything that was run",
                        str(row["robust_accuracy"]))  # fmt: skip
    for point in content.get("curve") or ():
        if not _is_number(point["eps"]) or point["eps"] < 0:
            _refuse("eps >= 0 along the curve", repr(point["eps"]))
        _check_accuracy(point["robust_accuracy"], point["interval"], None, "accuracy on the curve")


def _check_course(content: Mapping[str, Any]) -> None:
    for row in content.get("course") or ():
        for term, value in row.items():
            if term != "stage" and not _is_number(value):
                _refuse(f"a number for {term!r} in the course of training", repr(value))


def _check_classes(content: Mapping[str, Any]) -> None:
    classes = content.get("classes") or ()
    for row in classes:
        _check_accuracy(row["clean_accuracy"], None, row["n"], f"class {row['name']!r}")
        _check_accuracy(row["robust_accuracy"], None, row["n"], f"class {row['name']!r}")
    if not classes:
        return
    counted = sum(row["n"] for row in classes)
    if counted != content["n"]:
        _refuse(f"classes of n = {content['n']} images together", f"{counted}")
    for key in ("clean_accuracy", "robust_accuracy"):
        right = sum(round(row[key] * row["n"]) for row in classes)
        if right != round(content[key] * content["n"]):
            _refuse(f"{key} of the classes to add up to {content[key]}", f"{right} of {counted}")


def _check_gallery(content: Mapping[str, Any]) -> None:
    """Pictures are embedded PNG and nothing else: a report never makes a browser fetch anything."""
    for entry in content.get("gallery") or ():
        for key in ("image", "image_adv", "delta"):
            if not isinstance(entry[key], str) or not PNG.fullmatch(entry[key]):
                _refuse(f"a PNG data URI under gallery {key}", repr(entry[key])[:40])


def _check_defenses(content: Mapping[str, Any]) -> None:
    tiers = {row["tier"] for row in content.get("tiers") or ()}
    compared = {row["tier"] for row in content.get("side_by_side") or ()}
    defenses = content.get("defenses") or ()
    attackable = content["clean_accuracy"] > 0 and content["threat_model"]["eps"] > 0
    if attackable and "defensive distillation" in defenses and compared != {"naive", "adaptive"}:
        _refuse("naive and adaptive rows side_by_side (defensive distillation)", "none")
    if "purifier" in defenses and "W" not in tiers:
        _refuse("a white-box row (tier W) for a purifier", f"tiers {sorted(tiers)}")
    if tiers & {"G0", "G1", "G2"} and "W" not in tiers:
        _refuse("a white-box row (tier W) beside grey-box rows", f"tiers {sorted(tiers)}")
