"""Reports: numbers in; JSON, Markdown and one HTML page out. `schema` says what the JSON holds, and
everything else is rebuilt from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustify import course
from robustify.charts import Point, Series, curve
from robustify.errors import RunFolderError
from robustify.files import atomic_write
from robustify.rendering import count, interval, percent, plain, render, rows_of
from robustify.schema import validate

if TYPE_CHECKING:  # to rebuild a report takes neither data nor networks
    from robustify.data import DataSet
    from robustify.evaluation import Report

__all__ = [
    "complete", "html", "interval", "markdown", "percent", "read", "rebuild", "samples", "validate",
    "write_report",
]  # fmt: skip

WORDS = {
    "reliable": "no check found a reason to doubt this number",
    "suspect": "robustness estimate unreliable: upper bound only",
    "not applicable": "the checks could not be made; do not quote this number",
}
SIGNS = {"reliable": "✓", "suspect": "▲", "not applicable": "–"}
OUTCOMES = {True: "▲ raised", False: "· silent", None: "– not run"}
SPARED = "△ raised, not decisive"
MASKED = ("F1", "F2", "F3")  # what a naive attack shows where the logits blind it
GAP = 0.02  # between naive and adaptive, that F3 takes for masking
FEW = 20  # classes shown one by one; of more, the weakest and the strongest
ENDS = 8
OPTIONAL = (
    "training", "defenses", "side_by_side", "tiers", "flags", "curve", "classes", "gallery",
    "before", "sensitivity", "distances", "reference", "passes", "selection", "notices", "course",
    "seconds", "cost", "versions", "command",
)  # fmt: skip
OF_ATTACK = ("alone", "newly_broken", "queries", "passes")


def complete(
    report: Report,
    *,
    model: Mapping[str, Any],
    data: DataSet,
    training: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of report.json: the evaluation, what it was an evaluation of, and whatever
    `more` of the schema's optional keys the caller knows."""
    about_data = {"name": data.name, "split": "test", "fingerprint": data.fingerprint,
                  "class_names": list(data.class_names)}  # fmt: skip
    return {**report.to_dict(), "model": dict(model), "data": about_data, "training": training,
            **(more or {})}  # fmt: skip


def write_report(
    folder: Path,
    report: Report,
    *,
    model: Mapping[str, Any],
    data: DataSet,
    training: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Leave report.json, report.md, report.html and samples.jsonl in `folder`.

    The numbers are written first. Raises `RunFolderError` if they make no valid report.
    """
    content = complete(report, model=model, data=data, training=training, more=more)
    atomic_write(folder / "report.json", json.dumps(content, indent=2) + "\n")
    atomic_write(folder / "samples.jsonl", samples(report))
    rebuild(folder)


def rebuild(folder: Path) -> list[Path]:
    """Write report.md and report.html anew from report.json; returns both paths.

    Raises `RunFolderError` where report.json is missing, damaged or no valid report.
    """
    content = read(folder)
    written = {folder / "report.md": markdown(content), folder / "report.html": html(content)}
    for path, text in written.items():
        atomic_write(path, text)
    return list(written)


def samples(report: Report) -> str:
    """A JSON line per image: label, clean prediction, and whether it is right after each attack."""
    lines = []
    for index in range(report.n):
        verdicts = {name: bool(right[index]) for name, right in report.samples.items()}
        row = {"image": index, "label": int(report.labels[index]),
               "prediction": int(report.predictions[index]), "right_after": verdicts}  # fmt: skip
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


def read(folder: Path) -> dict[str, Any]:
    """The content of a folder's report.json; raises `RunFolderError` where none is valid."""
    try:
        content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"expected {folder} to hold a readable report.json: {error}; run robustify evaluate"
        ) from None
    try:
        validate(content)
    except RunFolderError as error:
        raise RunFolderError(f"{folder}: {error}") from None
    return dict(content)


def markdown(content: Mapping[str, Any]) -> str:
    """The report as Markdown, from the content of report.json."""
    return render("report.md.jinja", **view(content))


def html(content: Mapping[str, Any]) -> str:
    """The report as one page that loads nothing, from the content of report.json."""
    return render("report.html.jinja", **view(content), chart=_curve(content))


def subject(content: Mapping[str, Any]) -> str:
    """What this is a report of."""
    return f"Robustness of {content['model']['architecture']} on {content['data']['name']}"


def doubt(content: Mapping[str, Any]) -> str:
    """The warning in every title: the verdict's own, and one for each verdict not reliable."""
    status, said = content["verdict"]["status"], content["verdict"].get("title")
    if status == "reliable":
        return said or ""
    return f"{status}: {said or WORDS[status]}"


def setting(content: Mapping[str, Any]) -> str:
    """What every accuracy of this report carries: norm, eps, suite, n, seed."""
    threat = content["threat_model"]
    return (f"{threat['norm']}, eps {threat['eps_text']}, suite {content['suite']}, "
            f"n = {content['n']:,}, seed {content['seed']}")  # fmt: skip


def view(content: Mapping[str, Any]) -> dict[str, Any]:
    """What both templates show: the content with absent keys as None, and text made from it."""
    filled = dict.fromkeys(OPTIONAL) | dict(content)
    status = content["verdict"]["status"]
    return {
        **filled,
        "attacks": _attacks(content),
        "subject": subject(content),
        "doubt": doubt(content),
        "setting": setting(content),
        "words": WORDS[status],
        "sign": SIGNS[status],
        "fates": _fates(content),
        "shown_classes": _shown_classes(filled["classes"] or []),
        "flags": [{**flag, "outcome": _outcome(flag)} for flag in filled["flags"] or ()],
        "notes": content["verdict"].get("notes") or [],
        "facts": _facts(filled),
        "courses": course.tables(filled["course"] or ()),
        "comparison_rows": {
            "Naive against adaptive attack": filled["side_by_side"],
            "What the attacker knows": filled["tiers"],
        },
        "masked": masked(content),
    }


def masked(content: Mapping[str, Any]) -> str:
    """The sentence that calls gradient masking what it is; empty where none was seen."""
    rows = content.get("side_by_side") or ()
    of = {
        tier: min(
            (row for row in rows if row["tier"] == tier),
            default=None,
            key=lambda row: row["robust_accuracy"],
        )
        for tier in ("naive", "adaptive")
    }
    naive, adaptive = of["naive"], of["adaptive"]
    raised = [f["name"] for f in content.get("flags") or () if f["raised"] and f["name"] in MASKED]
    if not raised or naive is None or adaptive is None:
        return ""
    if naive["robust_accuracy"] <= adaptive["robust_accuracy"] + GAP:
        return ""
    return (
        f"This model masks gradients ({', '.join(raised)}): {naive['name']} leaves "
        f"{percent(naive['robust_accuracy'])} right, {adaptive['name']} "
        f"{percent(adaptive['robust_accuracy'])}. The difference is an attack that failed, and no "
        "robustness."
    )


def _attacks(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The attacks, each with the accuracy it started from."""
    rows, before = [], content["clean_accuracy"]
    for attack in content["attacks"]:
        rows.append({**dict.fromkeys(OF_ATTACK), **attack, "before": before})
        before = attack["robust_accuracy"]
    return rows


def _outcome(flag: Mapping[str, Any]) -> str:
    decides = flag.get("counts", True)
    return OUTCOMES[flag["raised"]] if decides or not flag["raised"] else SPARED


def _fates(content: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """What became of the n images: (kind of bar, words, images)."""
    n = content["n"]
    robust, clean = (round(content[key] * n) for key in ("robust_accuracy", "clean_accuracy"))
    return [("right", "still right after every attack", robust),
            ("hatched", "broken by an attack", clean - robust),
            ("track", "wrong before any attack", n - clean)]  # fmt: skip


def _shown_classes(classes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any] | str]:
    """Weakest class first; of many classes both ends, with a sentence for those between."""
    ordered = sorted(classes, key=lambda row: (row["robust_accuracy"], row["clean_accuracy"]))
    if len(ordered) <= FEW:
        return list(ordered)
    between = ordered[ENDS:-ENDS]
    first, last = between[0]["robust_accuracy"], between[-1]["robust_accuracy"]
    return [
        *ordered[:ENDS],
        f"{len(between):,} classes between, robust accuracy {percent(first)} to {percent(last)}",
        *ordered[-ENDS:],
    ]


def _curve(content: Mapping[str, Any]) -> str:
    line = series(content, "robust accuracy")
    if line is None:
        return ""
    threat, names = content["threat_model"], content["data"]["class_names"]
    classes = content.get("classes")
    chance = max(row["n"] for row in classes) / content["n"] if classes else None
    if chance is None and names:
        chance = 1 / len(names)
    return curve([line], marked=(threat["eps"], threat["eps_text"]), chance=chance,
                 title=f"Robust accuracy against eps, {threat['norm']}")  # fmt: skip


def series(content: Mapping[str, Any], name: str, mark: str = "") -> Series | None:
    """A report's accuracy over eps as a line that starts at the clean accuracy, if it has one."""
    points = [
        Point(row["eps"], str(row["eps_text"]), row["robust_accuracy"], *row["interval"])
        for row in content.get("curve") or ()
    ]
    if points and all(point.eps > 0 for point in points):
        points.insert(0, Point(0.0, "0", content["clean_accuracy"], *content["clean_interval"]))
    return Series(name, points, mark) if points else None


def _facts(content: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Everything needed to judge and to repeat the numbers, by heading; empty ones left out."""
    threat, model, data = content["threat_model"], content["model"], content["data"]
    images = "in [0, 1]; the model normalises itself"
    if size := model.get("image_size"):
        images = f"{plain(size)} pixels wide after resizing, {images}"
    names = data["class_names"]
    cost = {**(content["cost"] or {}), "evaluation_seconds": content["seconds"]}
    if content["passes"]:
        cost["passes_per_image"] = " + ".join(
            f"{count(content['passes'][kind])} {kind}" for kind in ("forward", "backward")
        )
    groups = {
        "Threat model": [
            ("norm", threat["norm"]), ("eps", _both(threat["eps_text"], threat["eps"])),
            ("goal", "untargeted: any wrong class"), ("images", images),
            *rows_of({k: v for k, v in threat.items() if k not in ("norm", "eps", "eps_text")}),
        ],
        "Model": [*rows_of({k: v for k, v in model.items() if k != "class_names"}),
                  *rows_of({"defenses": content["defenses"]})],
        "Data": [*rows_of({k: v for k, v in data.items() if k != "class_names"}),
                 ("images evaluated", f"{content['n']:,}"), ("classes", f"{len(names or ()):,}")],
        "Training": list(rows_of(content["training"] or {})),
        "Selection of the checkpoint": list(rows_of(_named(content["selection"], "how"))),
        "Sensitivity to the images": _sensitivity(content["sensitivity"] or {}),
        "Smallest perturbations": list(rows_of(content["distances"] or {})),
        "Reference": list(rows_of(_named(content["reference"], "row"))),
        "Cost": list(rows_of(cost)),
        "Versions": list(rows_of(content["versions"] or {})),
    }  # fmt: skip
    return {heading: rows for heading, rows in groups.items() if rows}


def _sensitivity(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The three measures, the one that no scale of the logits moves first."""
    if not found:
        return []
    s3 = ", ".join(f"{norm} {plain(value)}" for norm, value in (found["s3"] or {}).items())
    rows = [
        ("S3: pixels to the boundary, were it flat (median)", s3 or "no image is right"),
        ("S2: mean gradient of the summed logits", plain(found["s2"])),
        ("S2 / T", f"{plain(found['s2_over_temperature'])}, T = {plain(found['temperature'])}"),
    ]
    for temperature, s1 in found["s1"].items():
        counts = ", ".join(f"1e{e}: {n}" for e, n in s1["log10_histogram"].items())
        rows += [
            (f"S1: mean gradient of the probabilities at temperature {temperature}",
             f"median {plain(s1['median'])}, mean {plain(s1['mean'])}, exactly 0: {s1['zeros']}"),
            (f"S1 at temperature {temperature}, images by power of ten", counts or "none"),
        ]  # fmt: skip
    return [*rows, ("images", f"{found['n']}, of which {found['n_right']} right")]


def _both(text: str, number: float) -> str:
    return text if text == plain(number) else f"{text} = {plain(number)}"


def _named(value: Any, name: str) -> dict[str, Any]:
    """A mapping as it is, anything else under `name`."""
    return dict(value) if isinstance(value, Mapping) else {name: value}
