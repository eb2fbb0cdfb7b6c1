"""Numbers as text, and text that is safe in HTML and in Markdown. Everything is escaped unless it
is `Markup` (in HTML) or `Raw` (in Markdown)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tabulate import tabulate

from robustify import charts

MANY = 12  # of a longer list, such as class names, only as many are shown
TEMPLATES = Path(__file__).parent
SPECIAL = re.compile(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))")


class Raw(str):
    """Text that is Markdown already."""

    __slots__ = ()


def percent(fraction: float) -> str:
    """`0.523` as `52.3 %`."""
    return f"{100 * fraction:.1f} %"


def interval(bounds: Sequence[float]) -> str:
    """`(0.49, 0.55)` as `49.0 to 55.0 %`."""
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def count(number: float) -> str:
    """`11173962` as `11,173,962`; a fraction keeps one decimal below 1,000."""
    return f"{number:,.1f}" if isinstance(number, float) and number < 1000 else f"{number:,.0f}"


def plain(value: Any) -> str:
    """Any value of a report as short text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}" if value >= 100_000 else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        more = f", … ({len(value):,} in all)" if len(value) > MANY else ""
        return ", ".join(map(plain, value[:MANY])) + more
    return str(value)


def rows_of(value: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """Every value of nested settings as (dotted name, text), without what is None or empty."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from rows_of(inner, f"{within}{key}.")
        elif inner is not None and inner not in ([], (), ""):
            yield f"{within}{key}", plain(inner)


def literal(value: Any) -> str:
    """`value` as Markdown that shows exactly its text, on one line: no HTML, no emphasis."""
    if isinstance(value, Raw):
        return value
    text = re.sub(r"\s+", " ", str(value))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\1", text)


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Raw:
    """A Markdown table whose cells show exactly their text, without its empty columns."""
    cells = [[literal(cell) for cell in row] for row in rows]
    kept = [column for column in range(len(headers)) if any(row[column] for row in cells)]
    return Raw(
        tabulate(
            [[row[column] for column in kept] for row in cells],
            headers=[headers[column] for column in kept],
            tablefmt="github",
            disable_numparse=True,
        )
    )


def fenced(text: str) -> Raw:
    """`text` as a Markdown code block, whatever backticks it holds."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Raw(f"{fence}console\n{text}\n{fence}")


def render(template: str, **values: Any) -> str:
    """A template beside this file; one for HTML escapes HTML, one for Markdown escapes Markdown."""
    is_html = template.endswith(".html.jinja")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=is_html, undefined=StrictUndefined,
        finalize=None if is_html else literal, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        percent=percent, interval=interval, count=count, plain=plain, table=table, fenced=fenced
    )
    environment.globals.update(bar=charts.bar, patterns=charts.patterns, table=table)
    rendered = environment.get_template(template).render(**values)
    # Blocks left out leave blank lines; Markdown takes two or more of them as one.
    return re.sub(r"\n{3,}", "\n\n", rendered).strip() + "\n"
