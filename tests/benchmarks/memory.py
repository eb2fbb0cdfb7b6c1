"""Memory: the peak of a training step and of an evaluation, plainly transcribed and ours.

    python tests/benchmarks/memory.py [--record]

Every case is a process of its own with one thread: its peak resident memory less what it had after
the imports, for two batch sizes (`smaller`, `larger`). The difference between them, per image, is
what an image costs, and what is left (`fixed`) is weights, gradients, optimizer and code. Steps are
PeerAiD's, with an attack of two steps, which has the peak of any longer one. Evaluation is a whole
`fast` suite on one batch, of which few images outlive the first attack; beside it stands one
forward and backward of the same batch, which is the least that an attack by gradients can do.
"""

from __future__ import annotations

import json
import resource
import sys

import results
from timing import child

STEPS = 2  # of the attack; twice the step, so that the optimizer has its state
SIDES = ("step, plain", "step, ours", "step, ours checkpointed", "step, ours bf16",
         "forward and backward", "evaluation, fast")  # fmt: skip
NETWORKS = {  # architecture -> side in pixels, two batch sizes
    "resnet18": (32, (16, 48)),
    "vit_tiny_patch16_224": (224, (2, 6)),
}
QUICK = {"cnn_a": (32, (2, 4))}


def main() -> None:
    """Measure every case in a process of its own and print one table."""
    parser = results.parser(__doc__)
    parser.add_argument("--inside", help="a case as JSON, to be measured in this process")
    arguments = parser.parse_args()
    if arguments.inside:
        print(peak(*json.loads(arguments.inside)))
        return
    rows = []
    for network, (size, batches) in (QUICK if arguments.quick else NETWORKS).items():
        for side in SIDES[1:2] if arguments.quick else SIDES:
            rows.append(row(network, size, batches, side))
    results.show("memory", {"Peak memory, MiB, one CPU thread": rows}, record=arguments.record)


def row(network: str, size: int, batches: tuple[int, int], side: str) -> results.Row:
    """One case at both batch sizes."""
    small, large = (
        float(child([sys.executable, __file__, "--inside",
                     json.dumps([network, size, batch, side])]).output)
        for batch in batches
    )  # fmt: skip
    per_image = (large - small) / (batches[1] - batches[0])
    return {
        "network": f"{network}, {size} px",
        "what": side,
        "batches": " and ".join(map(str, batches)),
        "smaller": small,
        "larger": large,
        "per image": per_image,
        "fixed": small - per_image * batches[0],
    }


def peak(network: str, size: int, batch: int, side: str) -> float:
    """MiB that the case takes beyond what this process had after its imports."""
    import steps
    import torch

    from robustify.attacks.suite import make_suite, run_suite

    torch.set_num_threads(1)
    torch.mm(torch.rand(8, 8), torch.rand(8, 8))
    before = _resident()
    work = steps.new("peeraid", student=network, size=size, batch=batch, steps=STEPS)
    if side.startswith("step"):
        work = work if side == "step, plain" else work.copy(work.layout)
        if side.endswith("checkpointed"):
            for trained in (work.objective.student, work.objective.peer):
                trained.set_grad_checkpointing()
        step = (
            steps.plain(work) if side == "step, plain"
            else steps.ours(work, "bf16" if side.endswith("bf16") else "fp32")
        )  # fmt: skip
        for _ in range(2):
            step()
        return _resident() - before
    model = work.objective.student.eval().requires_grad_(False)
    with torch.no_grad():
        labels = model(work.images).argmax(1)
    if side == "forward and backward":
        images = work.images.requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        torch.autograd.grad(loss, images)
    else:
        threat = work.objective.threat
        suite = make_suite("fast", threat, 10)
        run_suite(model, work.images, labels, suite=suite, threat=threat, batch_size=batch)
    return _resident() - before


def _resident() -> float:
    """Peak resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
