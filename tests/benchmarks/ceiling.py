"""The training step against what the machine can do: matrix rate and copy bandwidth, measured.

    OMP_NUM_THREADS=1 python tests/benchmarks/ceiling.py [--record]
    python tests/benchmarks/ceiling.py --device cuda --batch 512

First the ceiling: square matrix products in each precision and a copy of memory. Then PeerAiD's
step, variant after variant: its floating-point operations, counted as torch dispatches them, per
second, as a share of the matrix rate of its precision. Convolutions may compute in TF32 on a GPU,
so fp32 has both rates there. What `VARIANTS` lists is what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import results
import steps
import torch
from timing import least

from robustify.effort import _FlopCount


@dataclass(frozen=True)
class Variant:
    """One way to run a step. `plain` is the transcription; `change` is applied to the work last:
    where whatever else makes a step faster goes, such as compiling."""

    name: str
    precision: str = "fp32"
    channels_last: bool = False
    plain: bool = False
    change: Callable[[steps.Work], steps.Work] = lambda work: work


VARIANTS = [
    Variant("plain transcription", plain=True),
    Variant("ours, eager"),
    Variant("ours, channels-last", channels_last=True),
    Variant("ours, bf16", "bf16"),
    Variant("ours, bf16, channels-last", "bf16", channels_last=True),
]


def main() -> None:
    """Measure the ceiling, then every variant, and print a table for each."""
    parser = results.parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--recipe", default="peeraid", help="a recipe's name")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    side, variants, attack_steps = 2048 if arguments.device == "cpu" else 8192, VARIANTS, 10
    if arguments.quick:
        side, arguments.student, arguments.batch, arguments.repeats = 256, "resnet20_cifar", 4, 1
        attack_steps = 1
    rates = matrix_rates(side, arguments.device, arguments.repeats)
    ceiling = [{"what": f"matrix product, {name}, {side} × {side}", "per second": rate / 1e9,
                "unit": "GFLOP"} for name, rate in rates.items()]  # fmt: skip
    bandwidth = copy_bandwidth(arguments.device, arguments.repeats, quick=arguments.quick)
    ceiling.append({"what": "copy, read and written", "per second": bandwidth / 1e9, "unit": "GB"})
    work = steps.new(
        arguments.recipe, student=arguments.student, size=arguments.size, batch=arguments.batch,
        steps=attack_steps, device=arguments.device,
    )  # fmt: skip
    rows = measure(work, variants, rates, arguments.device, arguments.repeats)
    where = "one CPU thread" if arguments.device == "cpu" else arguments.device
    tables = {
        f"What the machine can do, {where}": ceiling,
        f"{arguments.recipe}, {arguments.student}, {arguments.size} px, batch {arguments.batch}, "
        f"PGD-{attack_steps}, {where}": rows,
    }
    results.show("ceiling", tables, record=arguments.record)


def matrix_rates(side: int, device: str, repeats: int) -> dict[str, float]:
    """Floating-point operations per second of square matrix products, by precision."""
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    products = {}
    for name, dtype in kinds.items():
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        products[name] = partial(torch.mm, a, b, out=torch.empty_like(a))
    seconds = least(products, repeats=2 * repeats, device=device)
    if device != "cpu":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        seconds |= least({"tf32": products["fp32"]}, repeats=2 * repeats, device=device)
        torch.backends.cuda.matmul.allow_tf32 = before
    return {name: 2 * side**3 / each for name, each in seconds.items()}


def copy_bandwidth(device: str, repeats: int, *, quick: bool) -> float:
    """Bytes per second, read plus written, of a copy that no cache holds."""
    source = torch.rand(2**20 if quick else 2**27, device=device)  # 512 MiB
    target = torch.empty_like(source)
    seconds = least({"copy": lambda: target.copy_(source)}, repeats=2 * repeats, device=device)
    return 2 * source.numel() * source.element_size() / seconds["copy"]


def measure(
    work: steps.Work, variants: list[Variant], rates: dict[str, float], device: str, repeats: int
) -> list[results.Row]:
    """A row for each variant."""
    sides, operations = {}, {}
    for variant in variants:
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        own = variant.change(work.copy(layout))
        step = steps.plain(own) if variant.plain else steps.ours(own, variant.precision)
        step()  # the first traces and checks what is folded, which is no part of a step
        with _FlopCount() as counted:
            step()
        sides[variant.name], operations[variant.name] = step, counted.total
    seconds = least(sides, repeats=repeats, device=device)
    first = seconds[variants[0].name]
    return [
        {
            "variant": variant.name,
            "images/s": len(work.images) / seconds[variant.name],
            "ratio": first / seconds[variant.name],
            "GFLOP": operations[variant.name] / 1e9,
            "GFLOP/s": operations[variant.name] / seconds[variant.name] / 1e9,
            "of the matrix rate": _share(
                operations[variant.name] / seconds[variant.name] / rates[variant.precision]
            ),
        }
        for variant in variants
    ]


def _share(value: float) -> str:
    return f"{value:.0%}"


if __name__ == "__main__":
    main()
