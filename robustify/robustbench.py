"""A report as an entry of RobustBench: one file of its `model_info/<data set>/<norm>/`.

The fields are those of the files there (RobustBench, commit 78fcc9e): accuracies are strings in
percent with two decimals. Only an evaluation exactly like theirs becomes an entry: AutoAttack
`standard` on the whole CIFAR test split, or on 5,000 ImageNet validation images, which RobustBench
lists by name; whether the images are those 5,000 cannot be seen from a report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from robustify.errors import UsageError
from robustify.schema import validate

LEADERBOARDS = {
    ("cifar10", "Linf"): ("8/255", 8 / 255, 10_000),
    ("cifar10", "L2"): ("0.5", 0.5, 10_000),
    ("cifar100", "Linf"): ("8/255", 8 / 255, 10_000),
    ("imagenet", "Linf"): ("4/255", 4 / 255, 5_000),
}
PAPER = ("name", "authors", "link", "venue", "footnote")
NAMES = {"imagenet1k": "imagenet", "ilsvrc2012": "imagenet"}


def model_info(
    content: Mapping[str, Any],
    *,
    additional_data: bool,
    name: str = "",
    authors: str = "",
    link: str = "",
    venue: str = "Unpublished",
    footnote: str = "",
) -> dict[str, Any]:
    """The entry for a report. `name`, `authors`, `link` and `venue` are the paper's;
    `additional_data` says whether other images than the training split were used.

    Raises `UsageError` unless data set, norm, eps, n and suite are RobustBench's.
    """
    validate(content)
    data_name, eps_text = _leaderboard(content)
    robust = f"{100 * content['robust_accuracy']:.2f}"
    entry = {
        "link": link,
        "name": name or f"{content['model']['architecture']}, not published",
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": 1,
        "dataset": data_name,
        "venue": venue,
        "architecture": content["model"]["architecture"],
        "eps": eps_text,
        "clean_acc": f"{100 * content['clean_accuracy']:.2f}",
        "reported": robust,
        "autoattack_acc": robust,
        "unreliable": content["verdict"]["status"] == "suspect",
    }
    return {**entry, "footnote": footnote} if footnote else entry


def export(
    content: Mapping[str, Any], paper: Sequence[str], *, additional_data: bool
) -> dict[str, Any]:
    """`model_info` with the paper given as "key=value" texts.

    Raises `UsageError` for a key that is not one of `PAPER`.
    """
    fields: dict[str, Any] = {}
    for text in paper:
        key, separator, value = text.partition("=")
        if not separator or key not in PAPER:
            raise UsageError(f"expected KEY=VALUE with a key of {', '.join(PAPER)}, got {text!r}")
        fields[key] = value
    return model_info(content, additional_data=additional_data, **fields)


def _leaderboard(content: Mapping[str, Any]) -> tuple[str, str]:
    """Data set and eps as RobustBench writes them, or a refusal in one line."""
    given, split = content["data"]["name"], content["data"]["split"]
    plain = re.sub(r"[^a-z0-9]", "", str(given).lower())
    data_name, norm = NAMES.get(plain, plain), content["threat_model"]["norm"]
    if (data_name, norm) not in LEADERBOARDS:
        listed = ", ".join(f"{name} {norm}" for name, norm in LEADERBOARDS)
        raise UsageError(f"expected data and norm of RobustBench ({listed}), got {given} {norm}")
    eps_text, eps, n = LEADERBOARDS[data_name, norm]
    got = content["threat_model"]["eps"]
    if abs(got - eps) > 1e-6:
        raise UsageError(f"expected eps {eps_text} for {data_name} {norm}, got {got:g}")
    if content["n"] != n:
        raise UsageError(f"expected n = {n} images for {data_name}, got {content['n']}")
    if split not in ("test", "val", "validation"):
        raise UsageError(f"expected the test split of {data_name}, got {split}")
    if content["suite"] != "standard":
        raise UsageError(f"expected suite standard, got {content['suite']}")
    if content["verdict"]["status"] == "not applicable":
        raise UsageError("expected a verdict for RobustBench, got: not applicable")
    return data_name, eps_text
