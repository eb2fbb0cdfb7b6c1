"""The course of training: what the stages logged, at a few of their epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from robustify.rendering import plain

EPOCHS = 6  # of each stage, its first and its last among them; metrics.jsonl has all


def sampled(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`EPOCHS` rows of metrics.jsonl for each stage, evenly spread over those that it has."""
    chosen: list[dict[str, Any]] = []
    for _, stage in groupby(rows, key=lambda row: row["stage"]):
        own = list(stage)
        places = {round(i * (len(own) - 1) / (EPOCHS - 1)) for i in range(EPOCHS)}
        chosen += (dict(own[place]) for place in sorted(places))
    return chosen


def tables(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each stage a table of text: a row per term, a column per epoch, counted from 1."""
    made = []
    for name, stage in groupby(rows, key=lambda row: row["stage"]):
        own = list(stage)
        terms = dict.fromkeys(key for row in own for key in row if key not in ("stage", "epoch"))
        made.append({
            "stage": name,
            "epochs": [f"epoch {row['epoch'] + 1}" for row in own],
            "terms": [
                [term, *(plain(row[term]) if term in row else "" for row in own)] for term in terms
            ],
        })  # fmt: skip
    return made
