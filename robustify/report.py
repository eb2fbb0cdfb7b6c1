"""Reports: numbers in, JSON and Markdown out. Everything else is rebuilt from the JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from robustify.data import DataSet
from robustify.errors import RunFolderError
from robustify.evaluate import Report
from robustify.files import atomic_write


def complete(
    report: Report,
    *,
    model: Mapping[str, Any],
    data: DataSet,
    training: Mapping[str, Any] | None = None,
    notices: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of report.json: the evaluation, and what it was an evaluation of. `notices` are
    sentences that whoever reads the number has to know."""
    about_data = {"name": data.name, "split": "test", "fingerprint": data.fingerprint,
                  "class_names": list(data.class_names)}  # fmt: skip
    subject = {"model": dict(model), "data": about_data, "training": training}
    return {**report.to_dict(), **subject, "notices": list(notices)}


def write_report(
    folder: Path,
    report: Report,
    *,
    model: Mapping[str, Any],
    data: DataSet,
    training: Mapping[str, Any] | None = None,
    notices: Sequence[str] = (),
) -> None:
    """Leave report.json, report.md and samples.jsonl in `folder`."""
    content = complete(report, model=model, data=data, training=training, notices=notices)
    atomic_write(folder / "report.json", json.dumps(content, indent=2) + "\n")
    atomic_write(folder / "report.md", markdown(content))
    atomic_write(folder / "samples.jsonl", samples(report))


def samples(report: Report) -> str:
    """One JSON line per image: label, clean prediction, and whether it is right after each attack."""
    lines = []
    for index in range(report.n):
        verdicts = {name: bool(right[index]) for name, right in report.samples.items()}
        row = {"image": index, "label": int(report.labels[index]),
               "prediction": int(report.predictions[index]), "right_after": verdicts}  # fmt: skip
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


def read(folder: Path) -> dict[str, Any]:
    """The content of a folder's report.json; raises `RunFolderError` where there is none."""
    try:
        content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"expected {folder} to hold a readable report.json: {error}; run robustify evaluate"
        ) from None
    if not isinstance(content, dict) or "robust_accuracy" not in content:
        raise RunFolderError(f"expected {folder}/report.json to be a report of robustify")
    return content


def markdown(content: Mapping[str, Any]) -> str:
    """The report as Markdown, from the content of report.json."""
    threat, verdict, model = content["threat_model"], content["verdict"], content["model"]
    setting = f"{threat['norm']}, eps {threat['eps_text']}, n = {content['n']}, seed {content['seed']}"
    rows = [["none (clean)", percent(content["clean_accuracy"]), interval(content["clean_interval"]), ""]]
    rows += [
        [attack["name"], percent(attack["robust_accuracy"]), interval(attack["interval"]),
         ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                   for key, value in attack["settings"].items())]
        for attack in content["attacks"]
    ]  # fmt: skip
    table = tabulate(
        rows, headers=["attack", "accuracy", "95 % interval", "settings"], tablefmt="github"
    )
    reasons = "".join(f"\n- {reason}" for reason in verdict["reasons"])
    notices = "".join(f"\n> {notice}\n" for notice in content.get("notices", ()))
    return f"""# Robustness of {model["architecture"]} on {content["data"]["name"]}

**Robust accuracy {percent(content["robust_accuracy"])}** ({interval(content["interval"])}) under suite `{content["suite"]}`: {setting}.
An empirical upper bound, not a certificate. Clean accuracy {percent(content["clean_accuracy"])}.
{notices}
Verdict: **{verdict["status"]}**{reasons}

{table}
"""


def percent(fraction: float) -> str:
    """`0.523` as `52.3 %`."""
    return f"{100 * fraction:.1f} %"


def interval(bounds: tuple[float, float]) -> str:
    """`(0.49, 0.55)` as `49.0 to 55.0 %`."""
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"
