"""PeerAiD's training step: ours against a plain transcription of the method, one CPU thread.

    python tests/benchmarks/training_step.py [--student resnet18] [--size 32] [--batch 32]

The transcription follows the published order of work: the adversarial images are forwarded twice,
nothing is folded, memory is contiguous, the softmax of the target is taken anew in every attack
step. Both take the same weights and images; images per CPU second, and their ratio.
"""

import argparse
import copy
import time

import torch
from tabulate import tabulate
from torch.nn import functional as F

from robustify import config, models
from robustify.noise import Noise
from robustify.threat import ThreatModel

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--student", default="resnet18")
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--steps", type=int, default=3)
arguments = parser.parse_args()
torch.set_num_threads(1)

EPS, STEP_SIZE, STEPS, T = 8 / 255, 2 / 255, 10, 5.0


def kl(target, logits, temperature):
    """Per-image KL, batch mean, as `KLDivLoss(reduction="batchmean")` has it."""
    log_q = F.log_softmax(logits / temperature, dim=1)
    return F.kl_div(log_q, F.softmax(target / temperature, dim=1), reduction="batchmean")


def transcription(student, peer, optimizer, images, labels):
    """The specification's steps 1 to 10, in eager mode."""
    optimizer.zero_grad()
    peer.eval()
    with torch.no_grad():
        target = peer(images)
    peer.train()
    student.eval()
    images_adv = images + 0.001 * torch.randn_like(images)
    for _ in range(STEPS):
        images_adv.requires_grad_()
        loss = kl(target, student(images_adv), 1.0)
        gradient = torch.autograd.grad(loss, images_adv)[0]
        images_adv = images_adv.detach() + STEP_SIZE * gradient.sign()
        images_adv = torch.min(torch.max(images_adv, images - EPS), images + EPS).clamp(0, 1)
    student.train()
    peer_adv, student_adv = peer(images_adv), student(images_adv)
    peer_loss = F.cross_entropy(peer_adv, labels) + 0.01 * kl(student_adv, peer_adv, 1.0)
    again, clean = student(images_adv), student(images)
    student_loss = 2.5 * kl(peer_adv.detach(), again, T) + 2.5 * kl(clean, again, T)
    (student_loss + peer_loss).backward()
    optimizer.step()


def ours(objective, optimizer, images, labels, noise):
    """The recipe's Objective, as the loop runs it."""
    optimizer.zero_grad()
    objective(images, labels, noise)["loss"].backward()
    optimizer.step()


def sgd(*networks):
    """The published optimizer."""
    parameters = [p for network in networks for p in network.parameters()]
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=2e-4)


def seconds(step):
    """CPU seconds of one step: the least of several, after one to warm up."""
    step()
    times = []
    for _ in range(arguments.steps):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return min(times)


torch.manual_seed(0)
student = models.create(arguments.student, num_classes=10, image_size=arguments.size)
images = torch.rand(arguments.batch, 3, arguments.size, arguments.size)
labels = torch.randint(10, (arguments.batch,))
threat = ThreatModel("Linf", EPS)
attack = {"steps": STEPS, "step_size": STEP_SIZE, "start": "gaussian"}
stages = config.find("peeraid").load().stages


def measured(layout, precision):
    """CPU seconds of our step in a memory layout and a precision."""
    objective = next(stages(copy.deepcopy(student), [], threat=threat, attack=attack)).train()
    objective.to(memory_format=layout)
    optimizer = sgd(objective)
    batch, noise = images.contiguous(memory_format=layout), Noise.for_batch(0, images)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            ours(objective, optimizer, batch, labels, noise)

    return seconds(step)


plain_student, plain_peer = copy.deepcopy(student), models.like(student)
plain_optimizer = sgd(plain_student, plain_peer)
plain = seconds(lambda: transcription(plain_student, plain_peer, plain_optimizer, images, labels))
rows = [("plain transcription, fp32", plain)]
for name, layout in (
    ("contiguous", torch.contiguous_format),
    ("channels-last", torch.channels_last),
):
    rows.append((f"robustify, fp32, {name}", measured(layout, "fp32")))
rows.append(("robustify, bf16, channels-last", measured(torch.channels_last, "bf16")))
print(
    tabulate(
        [(name, arguments.batch / cpu, plain / cpu) for name, cpu in rows],
        headers=["PeerAiD step", "images per CPU second", "ratio"],
        floatfmt=".2f",
    )
)
