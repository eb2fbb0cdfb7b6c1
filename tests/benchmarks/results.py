"""Results of the benchmarks: printed as tables, kept in results.json, quoted in the README.

    python tests/benchmarks/results.py

writes the README's tables anew from results.json, which holds the last recorded run of each
benchmark (`--record`) with its command, date, machine and versions.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
README = HERE.parents[1] / "README.md"
SHARED = Path(os.environ.get("ROBUSTIFY_SHARED", HERE.parents[2] / "shared"))
BEGIN, END = "<!-- tests/benchmarks/results.py: begin -->", "<!-- end -->"
LIBRARIES = ("torch", "timm", "accelerate", "torchattacks", "foolbox", "autoattack")

Row = Mapping[str, Any]  # header -> text, number or None


def parser(description: str) -> argparse.ArgumentParser:
    """Options of every benchmark; `description` is its docstring."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest size")
    parser.add_argument("--record", action="store_true", help=f"keep it in {RESULTS.name}")
    return parser


def show(name: str, tables: Mapping[str, Sequence[Row]], *, record: bool) -> None:
    """Print the tables of the benchmark `name` by their titles, and keep them if asked."""
    entry = {
        "command": _command(name),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "tables": {
            title: [{k: _rounded(v) for k, v in row.items()} for row in rows]
            for title, rows in tables.items()
        },
    }
    print(render(name, entry), flush=True)
    print("\n" + about(entry), flush=True)
    if record:
        for row in itertools.chain(*tables.values()):
            if any(isinstance(value, float) and math.isnan(value) for value in row.values()):
                raise SystemExit(f"not recorded: a figure drowned in noise in {row}; run again")
        kept = read()
        kept[name] = entry
        ordered = {key: kept[key] for key in sorted(kept)}
        RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read() -> dict[str, Any]:
    """The recorded runs by benchmark."""
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}


def machine() -> dict[str, Any]:
    """The hardware: CPU model, cores, memory in GiB, and the GPU where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "bf16 instructions": sorted({"avx512_bf16", "amx_bf16"} & {*flags}),
        "cores": os.cpu_count(),
        "memory GiB": round(memory),
        **gpu,
    }


def versions() -> dict[str, str]:
    """Python and the libraries that are measured or measured against."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def about(entry: Mapping[str, Any]) -> str:
    """Machine, versions and date of a recorded run, on one line."""
    machine = entry["machine"]
    parts = [
        machine["cpu"] + "".join(f" with {name}" for name in machine["bf16 instructions"]),
        f"{machine['cores']} cores",
        f"{machine['memory GiB']} GiB",
        *([machine["gpu"]] if "gpu" in machine else []),
        *(f"{name} {version}" for name, version in entry["versions"].items()),
        entry["date"],
    ]
    return ", ".join(parts)


def render(name: str, entry: Mapping[str, Any]) -> str:
    """The tables of one recorded run in Markdown."""
    parts = [f"`{entry['command']}`"]
    for title, rows in entry["tables"].items():
        cells = [{key: _text(value) for key, value in row.items()} for row in rows]
        table = tabulate(cells, headers="keys", tablefmt="pipe", disable_numparse=True)
        parts.append(f"{title}:\n\n{table}")
    return f"### `{name}`\n\n" + "\n\n".join(parts)


def section(entries: Mapping[str, Any]) -> str:
    """What stands in the README between the markers; the machine once, where it is the same."""
    lines = {name: about(entry) for name, entry in entries.items()}
    ((usual, _),) = Counter(lines.values()).most_common(1)
    parts = [f"Measured on: {usual}."]
    for name, entry in entries.items():
        parts.append(render(name, entry))
        if lines[name] != usual:
            parts.append(f"Measured on: {lines[name]}.")
    return "\n\n".join(parts)


def quoted(readme: str) -> str:
    """What the README has between the markers."""
    return readme.split(BEGIN)[1].split(END)[0].strip()


def _command(name: str) -> str:
    words = [word for word in sys.argv[1:] if word != "--record"]
    words = [word.replace(str(SHARED), "$ROBUSTIFY_SHARED") for word in words]
    line = " ".join(word if "$" in word else shlex.quote(word) for word in words)
    return f"python tests/benchmarks/{name}.py {line}".strip()


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None  # JSON has no nan


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main() -> None:
    """Write the README's tables anew."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    readme = README.read_text("utf-8")
    old = readme.split(BEGIN)[1].split(END)[0]
    new = f"\n\n{section(read())}\n\n"
    README.write_text(readme.replace(BEGIN + old + END, BEGIN + new + END), "utf-8")


if __name__ == "__main__":
    main()
