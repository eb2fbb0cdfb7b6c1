"""Several reports beside each other: what is ranked, what is marked as incomparable."""

import re

import pytest
from reports import Page, full, minimal

from robustify.comparison import compare_html, compare_markdown
from robustify.errors import UsageError


def test_comparable_runs_are_ranked_only_where_intervals_allow_it():
    better, worse = full(), minimal(1000, 812, 300)
    worse |= {"suite": "standard"}
    assert "A has the highest robust accuracy, 49.7 %, and no other" in compare_markdown(
        [better, worse]
    )
    near = minimal(1000, 812, 480) | {"suite": "standard"}
    assert "overlaps that of B" in compare_markdown([better, near])
    assert "verdict of A is not reliable" in compare_html([full("suspect"), near])


def test_what_cannot_be_compared_is_marked():
    other = minimal(500, 400, 200)
    other["threat_model"] = {"norm": "L2", "eps": 0.5, "eps_text": "0.5"}
    other["data"]["fingerprint"] = "00" * 32
    text = compare_markdown([full(), other], ["runs/a", "runs/b"])
    for aspect in ("threat model", "data", "n", "suite"):
        assert f"{aspect} differs" in text
        assert f"▲ {aspect} differs" in text
    assert "highest robust accuracy" not in text
    assert "runs/b" in text
    page = compare_html([full(), other])
    assert "not comparable" in re.search("<title>(.*?)</title>", page)[1]
    assert "differs" not in Page(compare_html([full(), full()])).text
    assert Page(compare_html([full(), full()])).tags.count("polyline") == 2


def test_many_runs_are_compared():
    runs = [full() for _ in range(30)]
    page = Page(compare_html(runs))
    assert page.tags.count("polyline") == 30
    with pytest.raises(UsageError, match="at least two"):
        compare_markdown(runs[:1])


def test_naive_and_adaptive_attacks_stand_in_one_table():
    masked = full("suspect")
    masked["side_by_side"][0]["name"] = "pgd-ce"
    masked["side_by_side"].insert(1, {**masked["side_by_side"][1], "name": "pgd-ce-scaled"})
    distribution = {"mean": 1e-3, "median": 2.5e-7, "zeros": 0, "log10_histogram": {"-7": 9}}
    masked["sensitivity"] = {
        "n": 9, "n_right": 8, "temperature": 20.0, "s1": {"1": distribution, "20": distribution},
        "s2": 40.0, "s2_over_temperature": 2.0, "s3": {"Linf": 0.031, "L2": 0.4},
    }  # fmt: skip
    plain = full()
    text = compare_markdown([plain, masked], ["plain", "masked"])
    row = next(
        line for line in text.splitlines() if line.startswith("| B masked ") and "79.1" in line
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["B masked", "81.2 %", "2.5e-07", "2", "0.031", "79.1 %", "49.7 %", "49.7 %",
                     "suspect"]  # fmt: skip
    assert "B masked: This model masks gradients (F1)" in text
    assert "79.1 %" in Page(compare_html([plain, masked])).text
    assert "masks gradients" not in compare_markdown([plain, plain])
    assert "Naive against adaptive" not in compare_markdown([minimal(), minimal()])
