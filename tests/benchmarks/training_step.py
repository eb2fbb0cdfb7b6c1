"""The training step of every recipe: ours against a plain transcription of the method.

    OMP_NUM_THREADS=1 python tests/benchmarks/training_step.py [--recipe all|NAME] [--record]

Both sides take the same weights, images and number of attack steps. `same images`: how far the two
losses are apart when ours is given the adversarial images that the transcription found, relative;
`own images`: when each searches its own from the same start, where folded BatchNorm turns a few
signs. `passes` are model passes per image, forward plus backward, of all networks. Recipes with
several stages show the one with most work in a run: `teacher_assistant` a link of mode paper,
`purifier` its robust teacher of mode adaptive. `attack_bn=train` attacks in train mode, as ARD and
IAD published it; ours by default does not.
"""

from __future__ import annotations

from contextlib import nullcontext

import results
import steps
import torch
from timing import least
from transcriptions import CASES

from robustify.attacks.pgd import repeating


def main() -> None:
    """Measure the recipes asked for and print one table."""
    parser = results.parser(__doc__)
    parser.add_argument("--recipe", default="all", help="all, or a recipe's name")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.student, arguments.batch = "resnet20_cifar", 2
        arguments.steps, arguments.repeats = 1, 1
    names = [n for n in CASES if arguments.recipe in ("all", n, n.partition(",")[0])]
    if not names:
        parser.error(f"expected all or a recipe of {', '.join(CASES)}, got {arguments.recipe}")
    sizes = {key: getattr(arguments, key) for key in ("student", "size", "batch", "steps")}
    rows = [row(name, sizes, arguments.repeats) for name in names]
    title = (
        f"{arguments.student}, {arguments.size} px, batch {arguments.batch}, "
        f"PGD-{arguments.steps}, one CPU thread; images per CPU second, and their ratios"
    )
    results.show("training_step", {title: rows}, record=arguments.record)


def row(name: str, sizes: dict, repeats: int) -> results.Row:
    """One recipe: what both sides compute, and how fast."""
    work = steps.new(name, **sizes)
    few = {**sizes, "batch": min(sizes["batch"], 4)}
    same, own, plain_passes, our_passes = compare(steps.new(name, **few))
    sides = {
        "plain": steps.plain(work.copy()),
        "fp32": steps.ours(work.copy(work.layout)),
        "bf16": steps.ours(work.copy(work.layout), "bf16"),
    }
    seconds = least(sides, repeats=repeats)
    batch = len(work.images)
    return {
        "recipe": name,
        "plain passes": round(plain_passes, 1),
        "our passes": round(our_passes, 1),
        "same images": f"{same:.0e}",
        "own images": None if own is None else f"{own:.0e}",
        "plain": batch / seconds["plain"],
        "ours": batch / seconds["fp32"],
        "ratio": seconds["plain"] / seconds["fp32"],
        "bf16 ratio": seconds["plain"] / seconds["bf16"],
    }


def compare(work: steps.Work) -> tuple[float, float | None, float, float]:
    """Relative differences of the losses on the same and on their own adversarial images, and the
    model passes of both. Raises RuntimeError where the two do not compute the same loss."""
    start, found = steps.our_start(work), []
    transcribed = work.copy()

    def plain_loss() -> torch.Tensor:
        loss, images_adv = steps.plain_loss(transcribed, start)
        found.append((loss.item(), images_adv))
        return loss

    plain_passes = steps.passes(transcribed, plain_loss)
    ((expected, images_adv),) = found
    with repeating([images_adv]) if images_adv is not None else nullcontext():
        same = abs(steps.our_loss(work.copy()).item() / expected - 1)
    own = None
    if images_adv is not None:
        own = abs(steps.our_loss(work.copy(work.layout)).item() / expected - 1)
    counted = work.copy()
    our_passes = steps.passes(counted, lambda: steps.our_loss(counted))
    if not same < 1e-3:
        raise RuntimeError(f"expected one loss from both sides, they are {same:.1e} apart")
    return same, own, plain_passes, our_passes


if __name__ == "__main__":
    main()
