"""Several reports beside each other, with a warning for whatever makes them incomparable."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from robustify.charts import Series, curve, key
from robustify.errors import UsageError
from robustify.rendering import percent, render
from robustify.report import masked, series
from robustify.schema import validate

ASPECTS = ("threat model", "data", "n", "suite")
COMPARED = ("run", "clean accuracy", "S1 (median)", "S2 / T", "S3 (Linf)", "naive: PGD on CE",
            "adaptive: PGD on z / s", "worst case over all attacks", "verdict")  # fmt: skip


def compare_markdown(contents: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> str:
    """Reports as one Markdown table; `names` are shown for them, such as their folders.

    Raises `UsageError` for fewer than two, `RunFolderError` for an invalid one.
    """
    return render("comparison.md.jinja", **view(contents, names))


def compare_html(contents: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> str:
    """As `compare_markdown`, as one page that loads nothing, with the curves overlaid."""
    return render("comparison.html.jinja", **view(contents, names), charts=_curves(contents))


def view(contents: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> dict[str, Any]:
    """What both templates show."""
    if len(contents) < 2:
        raise UsageError(f"expected at least two reports to compare, got {len(contents)}")
    for content in contents:
        validate(content)
    marks = [_mark(position) for position in range(len(contents))]
    shown = names or [""] * len(contents)
    runs = [_run(*one) for one in zip(contents, marks, shown, strict=True)]
    labels = [f"{run['mark']} {run['name']}".strip() for run in runs]
    differing = [aspect for aspect in ASPECTS if len({run["aspects"][aspect] for run in runs}) > 1]
    return {
        "runs": runs,
        "differing": differing,
        "compared_headers": COMPARED,
        "compared": _compared(contents, labels),
        "masked": [f"{label}: {said}" for label, content in zip(labels, contents, strict=True)
                   if (said := masked(content))],
        "warnings": [_warning(aspect, runs) for aspect in differing],
        "conclusion": "" if differing else _conclusion(runs),
    }  # fmt: skip


def _mark(position: int) -> str:
    """A, B, … Z, then 27, 28, …"""
    letters = string.ascii_uppercase
    return letters[position] if position < len(letters) else str(position + 1)


def _run(content: Mapping[str, Any], mark: str, name: str) -> dict[str, Any]:
    threat, data = content["threat_model"], content["data"]
    training = content.get("training") or {}
    passes = content.get("passes")
    return {
        **{key: content[key] for key in ("clean_accuracy", "clean_interval", "robust_accuracy",
                                         "interval", "verdict", "seed", "n")},
        "mark": mark,
        "name": name,
        "model": content["model"]["architecture"],
        "recipe": training.get("recipe") or "–",
        "passes": passes["forward"] + passes["backward"] if passes else None,
        "aspects": {
            "threat model": f"{threat['norm']} {threat['eps_text']}",
            "data": f"{data['name']} {data['fingerprint'][:8]}",
            "n": f"{content['n']:,}",
            "suite": str(content["suite"]),
        },
    }  # fmt: skip


def _compared(contents: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[list[str]]:
    """Run, clean accuracy, sensitivities, naive PGD, adaptive PGD, everything that was tried,
    verdict: a row for each run, if both were made on any."""
    rows = []
    for content, label in zip(contents, labels, strict=True):
        found = {r["name"]: r["robust_accuracy"] for r in content.get("side_by_side") or ()}
        pair = [percent(found[n]) if n in found else "" for n in ("pgd-ce", "pgd-ce-scaled")]
        rows.append([
            label, percent(content["clean_accuracy"]), *_sensitivity(content.get("sensitivity")),
            *pair, percent(content["robust_accuracy"]), content["verdict"]["status"],
        ])  # fmt: skip
    return rows if any(row[-4] and row[-3] for row in rows) else []


def _sensitivity(found: Mapping[str, Any] | None) -> list[str]:
    """S1, S2 / T and S3; empty where they were not taken."""
    if not found:
        return ["", "", ""]
    distance = (found["s3"] or {}).get("Linf")
    return [f"{found['s1']['1']['median']:.2g}", f"{found['s2_over_temperature']:.2g}",
            "–" if distance is None else f"{distance:.2g}"]  # fmt: skip


def _warning(aspect: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """`suite differs: standard (A, C), pgd (B)`."""
    held: dict[str, list[str]] = {}
    for run in runs:
        held.setdefault(run["aspects"][aspect], []).append(run["mark"])
    values = ", ".join(f"{value} ({', '.join(marks)})" for value, marks in held.items())
    return f"{aspect} differs: {values}; these robust accuracies do not measure the same thing"


def _conclusion(runs: Sequence[Mapping[str, Any]]) -> str:
    """Which run is ahead, if the intervals say so and the verdicts let one believe it."""
    doubtful = [run["mark"] for run in runs if run["verdict"]["status"] != "reliable"]
    if doubtful:
        return f"No run is called better: the verdict of {', '.join(doubtful)} is not reliable."
    best = max(runs, key=lambda run: run["robust_accuracy"])
    near = [run["mark"] for run in runs
            if run is not best and run["interval"][1] >= best["interval"][0]]  # fmt: skip
    found = f"{best['mark']} has the highest robust accuracy, {percent(best['robust_accuracy'])}"
    if near:
        return (f"{found}, but its interval overlaps that of {', '.join(near)}: "
                f"{best['n']:,} images do not decide between them.")  # fmt: skip
    return f"{found}, and no other interval reaches its own. Each run is one training seed."


def _curves(
    contents: Sequence[Mapping[str, Any]],
) -> list[tuple[str, Markup, list[tuple[Markup, str]]]]:
    """One chart per norm and data set, because only those share an axis: title, chart, legend."""
    groups: dict[str, list[Series]] = {}
    for position, content in enumerate(contents):
        mark = _mark(position)
        name = f"{mark}: {content['model']['architecture']}"
        if line := series(content, name, mark):
            data = content["data"]
            title = f"{content['threat_model']['norm']}, {data['name']} {data['fingerprint'][:8]}"
            groups.setdefault(title, []).append(line)
    return [
        (title, curve(lines, title=f"Robust accuracy against eps: {title}"),
         [(key(number), line.name) for number, line in enumerate(lines)])
        for title, lines in groups.items()
    ]  # fmt: skip
