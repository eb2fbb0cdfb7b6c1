"""The training step against what the machine can do: matrix rate and copy bandwidth, measured.

    OMP_NUM_THREADS=1 python tests/benchmarks/ceiling.py [--record]
    python tests/benchmarks/ceiling.py --device cuda --batch 512

First the ceiling: square matrix products and a 3×3 convolution in each precision, and a copy of
memory. Then PeerAiD's step, variant after variant: its floating-point operations, counted as torch
dispatches them, per second, as a share of the ceiling of its precision: the faster of product and
convolution, because the matrix library of some processors is slower than their convolutions. On a
GPU convolutions of fp32 may compute in TF32, and matrix products do so here too. What `VARIANTS`
lists is what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import results
import steps
import torch
from timing import least
from torch.nn.functional import conv2d

from robustify.compilation import compiling
from robustify.effort import FlopCount

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """One way to run a step; `plain` is the transcription, `compiled` is measured on a GPU only,
    because on a CPU it does not pay (`robustify.compilation`)."""

    name: str
    precision: str = "fp32"
    channels_last: bool = False
    plain: bool = False
    compiled: bool = False


VARIANTS = [
    Variant("plain transcription", plain=True),
    Variant("ours, eager"),
    Variant("ours, channels-last", channels_last=True),
    Variant("ours, bf16", "bf16"),
    Variant("ours, bf16, channels-last", "bf16", channels_last=True),
    Variant("ours, bf16, channels-last, compiled", "bf16", channels_last=True, compiled=True),
]


def main() -> None:
    """Measure the ceiling, then every variant, and print a table for each."""
    parser = results.parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--recipe", default="peeraid", help="a recipe's name")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    on_cpu, attack_steps = arguments.device == "cpu", 10
    side, variants = 2048 if on_cpu else 8192, [v for v in VARIANTS if not (on_cpu and v.compiled)]
    if arguments.quick:
        side, arguments.student, arguments.batch, arguments.repeats = 256, "resnet20_cifar", 4, 1
        attack_steps = 1
    rates = dense_rates(side, arguments.device, arguments.repeats)
    ceiling = [
        {"what": f"{kind}, {precision}", "per second": rate / 1e9, "unit": "GFLOP"}
        for (kind, precision), rate in rates.items()
    ]
    bandwidth = copy_bandwidth(arguments.device, arguments.repeats, quick=arguments.quick)
    ceiling.append({"what": "copy, read and written", "per second": bandwidth / 1e9, "unit": "GB"})
    work = steps.new(
        arguments.recipe, student=arguments.student, size=arguments.size, batch=arguments.batch,
        steps=attack_steps, device=arguments.device,
    )  # fmt: skip
    best = {p: max(rate for (_, q), rate in rates.items() if p == q) for p in PRECISIONS}
    rows = measure(work, variants, best, arguments.device, arguments.repeats)
    where = "one CPU thread" if on_cpu else arguments.device
    tables = {
        f"What the machine can do, {where}": ceiling,
        f"{arguments.recipe}, {arguments.student}, {arguments.size} px, batch {arguments.batch}, "
        f"PGD-{attack_steps}, {where}": rows,
    }
    results.show("ceiling", tables, record=arguments.record)


@torch.no_grad()
def dense_rates(side: int, device: str, repeats: int) -> dict[tuple[str, str], float]:
    """Floating-point operations per second of dense work, by kind and precision."""
    work: dict[tuple[str, str], Callable[[], object]] = {}
    product, convolution = (
        f"matrix product, {side} × {side}",
        f"3×3 convolution, {side // 8} channels",
    )
    batch, channels, pixels = side // 128, side // 8, 16
    for precision, dtype in PRECISIONS.items():
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        work[product, precision] = partial(torch.mm, a, b, out=torch.empty_like(a))
        images = torch.rand(batch, channels, pixels, pixels, device=device).to(dtype)
        weight = torch.rand(channels, channels, 3, 3, device=device).to(dtype)
        images, weight = (t.contiguous(memory_format=torch.channels_last) for t in (images, weight))
        work[convolution, precision] = partial(conv2d, images, weight, padding=1)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    seconds = least(work, repeats=2 * repeats, device=device)
    torch.backends.cuda.matmul.allow_tf32 = before
    operations = {product: 2 * side**3, convolution: 2 * 9 * batch * (channels * pixels) ** 2}
    return {key: operations[key[0]] / each for key, each in seconds.items()}


def copy_bandwidth(device: str, repeats: int, *, quick: bool) -> float:
    """Bytes per second, read plus written, of a copy that no cache holds."""
    source = torch.rand(2**20 if quick else 2**27, device=device)  # 512 MiB
    target = torch.empty_like(source)
    seconds = least({"copy": lambda: target.copy_(source)}, repeats=2 * repeats, device=device)
    return 2 * source.numel() * source.element_size() / seconds["copy"]


def measure(
    work: steps.Work, variants: list[Variant], best: dict[str, float], device: str, repeats: int
) -> list[results.Row]:
    """A row for each variant."""
    sides, operations = {}, {}
    for variant in variants:
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        own = work.copy(layout)
        step = steps.plain(own) if variant.plain else steps.ours(own, variant.precision)
        step()  # the first traces and checks what is folded, which is no part of a step
        with FlopCount() as counted:
            step()
        sides[variant.name] = _compiled(step) if variant.compiled else step
        operations[variant.name] = counted.total
    seconds = least(sides, repeats=repeats, device=device)
    first = seconds[variants[0].name]
    return [
        {
            "variant": variant.name,
            "images/s": len(work.images) / seconds[variant.name],
            "ratio": first / seconds[variant.name],
            "GFLOP": operations[variant.name] / 1e9,
            "GFLOP/s": operations[variant.name] / seconds[variant.name] / 1e9,
            "of the ceiling": _share(
                operations[variant.name] / seconds[variant.name] / best[variant.precision]
            ),
        }
        for variant in variants
    ]


def _compiled(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with compiling():
            step()

    return run


def _share(value: float) -> str:
    return f"{value:.0%}"


if __name__ == "__main__":
    main()
