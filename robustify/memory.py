"""Memory: how much a device has left, what images need of it, and how its end is told."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

_CGROUP = Path("/sys/fs/cgroup")  # what a container or a SLURM job is allowed
EVALUATED = {"cpu": 250, "cuda": 2000}  # images at most: beyond that a pass gets no cheaper
_SHARE = 4  # of what is free, an evaluation's activations take one part in so many
_ROWS = 8  # images that are tried, and the least that an evaluation takes at once

_WORDS = (
    "can't allocate memory",  # torch on Linux
    "not enough memory",  # torch elsewhere
    "could not create a primitive",  # oneDNN, which runs the convolutions of a CPU
    "could not create a memory",
    "std::bad_alloc",
    "out of memory",
)


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that the memory of a GPU, or of the machine, was not enough."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def free(device: torch.device) -> int:
    """Bytes that this process can still allocate on `device`."""
    if device.type == "cuda":
        left, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(left) + kept
    found = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        found = min(found, int(limit) - int(used))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    limit_of_process, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_of_process != resource.RLIM_INFINITY:
        found = min(found, limit_of_process - psutil.Process().memory_info().vms)
    return max(found, 0)


def in_use(device: torch.device) -> int:
    """Bytes that this process has on `device` now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def peak(device: torch.device) -> int:
    """The most bytes that this process has ever had on `device`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def activations(network: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """Bytes that a forward of `images` (N, C, H, W) keeps for the gradient by the images."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        network(images.detach().clone().requires_grad_())
    return sum(kept.values())


def evaluation_batch(
    network: Callable[[Tensor], Tensor], images: Tensor, *, processes: int = 1
) -> int:
    """How many of `images` (N, C, H, W) to attack at once: as many as a quarter of the free memory
    holds activations of, at most 250 on a CPU and 2,000 on a GPU, at least 8. `processes` share a
    CPU. No verdict depends on it."""
    device = images.device
    few = images[:_ROWS]
    needed = max(activations(network, few) // len(few), 1)
    share = processes if device.type == "cpu" else 1
    fits = free(device) // (_SHARE * share * needed)
    return max(_ROWS, min(EVALUATED.get(device.type, EVALUATED["cpu"]), fits))
