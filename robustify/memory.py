"""Memory: how much a device has left, what images need of it, and errors that say it ran out."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor

_CGROUPS = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")
EVALUATED = {"cpu": 250, "cuda": 2000}  # images at most: beyond that a pass gets no cheaper
_SHARE = 4  # of what is free, an evaluation's activations take one part in so many
ROWS = 8  # the least that an evaluation asks at once

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
    found = min([int(psutil.virtual_memory().available), *_left_in_groups()])
    limit_of_process, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_of_process != resource.RLIM_INFINITY:
        found = min(found, limit_of_process - psutil.Process().memory_info().vms)
    return max(found, 0)


def _left_in_groups() -> Iterator[int]:
    """What every control group around this process (a container's, a SLURM job's) has left, where
    it has a limit. What the group's files hold in the page cache counts as free."""
    for hierarchy, path in _groups():
        limit, used, cached = _GROUP_FILES[hierarchy]
        root = _CGROUPS / hierarchy
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            try:
                numbers = [int((folder / name).read_text()) for name in (limit, used)]
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                yield numbers[0] - numbers[1] + int(stat.get(cached, 0))
            except (OSError, ValueError):  # no such file, or no limit: "max"
                pass
            if folder == root:
                break


_GROUP_FILES = {  # by hierarchy, of version 2 and of version 1
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _groups() -> Iterator[tuple[str, str]]:
    """(hierarchy, path below it) of the control groups that may limit this process."""
    try:
        lines = (_PROCESS / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "" or "memory" in kinds.split(","):
            yield ("memory" if kinds else ""), path


def in_use(device: torch.device) -> int:
    """Bytes that this process has on `device` now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def watch(device: torch.device) -> None:
    """From now on `peak` speaks of what comes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # Linux alone can forget a peak; elsewhere `peak` is the process's own
        (_PROCESS / "clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """The most bytes that this process has had on `device`, since `watch` where that is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in (_PROCESS / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def activations(network: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Bytes that a forward of (N, C, H, W) images keeps of each for the gradient by the images:
    what 8 of them keep more than 4, so that weights do not count."""
    few = images[:ROWS]
    if len(few) < 2:
        return _kept(network, few)
    half = len(few) // 2
    return (_kept(network, few) - _kept(network, few[:half])) / (len(few) - half)


def _kept(network: Callable[[Tensor], Tensor], images: Tensor) -> int:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        logits = network(images.detach().clone().requires_grad_())
    del logits  # which keeps them: an address is not used again before
    return sum(kept.values())


def evaluation_batch(
    network: Callable[[Tensor], Tensor], images: Tensor, *, processes: int = 1
) -> int:
    """How many of `images` (N, C, H, W) to attack at once: as many as a quarter of the free memory
    holds activations of, at most 250 on a CPU and 2,000 on a GPU, at least 8. `processes` share a
    CPU. No verdict depends on it."""
    device = images.device
    needed = max(activations(network, images), 1)
    share = processes if device.type == "cpu" else 1
    fits = int(free(device) / (_SHARE * share * needed))
    return max(ROWS, min(EVALUATED.get(device.type, EVALUATED["cpu"]), fits))
