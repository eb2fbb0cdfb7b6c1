"""The copy of a network that stands still while its images are searched.

Inner maximization and evaluation run a network many times at the same weights. `constant` lends a
copy in eval mode whose parameters take no gradients and whose BatchNorms are folded into the
convolutions before them:  BN(Wx + b) = sWx + s(b - mean) + bias,  s = weight / sqrt(var + eps).
Inside `robustify.compilation.compiling` the copy is compiled as well.

The copy is traced once per network and kept beside it, never in it; each use only copies the
weights over. What cannot be traced or has nothing to fold is lent itself, and given back as it was.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustify import compilation

log = logging.getLogger(__name__)

# Measured for ResNet-18, attack on one CPU thread: 10 % faster at 32 px, 14 % slower at 8 px.
CHANNELS_LAST_FROM = 16
_CHECKED_IMAGES = 8
# Away from the CPU convolutions may round to TF32; the check is for blunders, not for rounding.
_TOLERANCE = {"cpu": 1e-4}
_TOLERANCE_ELSEWHERE = 5e-2


@contextmanager
def constant(network: nn.Module, images: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Lend `network` as a function from images to logits, for attacks at its present weights.

    `images` (N, C, H, W) are the first that it will see: on first use, folded and plain logits of
    eight of them are compared. Modes, gradients, buffers and `requires_grad` of the network are
    afterwards as they were; its weights must not change inside. Give the network itself, not its
    DistributedDataParallel. The same weights give the same bits.
    """
    folded = _folded(network, images)
    if folded is not None:
        yield folded
        return
    with _still(network):
        yield network


def prefers_channels_last(network: nn.Module, image_size: int) -> bool:
    """Whether channels-last memory pays for images of this many pixels a side."""
    convolutional = any(isinstance(module, nn.Conv2d) for module in network.modules())
    return convolutional and image_size >= CHANNELS_LAST_FROM


@contextmanager
def _still(network: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside, and everything as it was afterwards.

    Nor gradient checkpointing, as timm's networks know it: a search keeps a third of what a
    training step does, and every one of its steps would take a third longer.
    """
    modules: list[Any] = list(network.modules())
    modes = [(module, module.training) for module in modules]
    checkpointed = [module for module in modules if getattr(module, "grad_checkpointing", False)]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.eval()
    for module in checkpointed:
        module.grad_checkpointing = False
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module in checkpointed:
            module.grad_checkpointing = True
        for parameter in trained:
            parameter.requires_grad_(True)


class _Folded:
    """A folded copy of one network, independent of it but for `refresh`."""

    def __init__(self, network: nn.Module, channels_last: bool) -> None:
        self.built_from = _Fingerprint.of(network, channels_last)
        self.graph, self.pairs = _trace(network)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.graph.to(memory_format=self.layout)
        tensors = [*self.graph.named_parameters(), *self.graph.named_buffers()]
        of_pairs = {f"{conv}.{name}" for conv in self.pairs for name in ("weight", "bias")}
        self.rest = [(name, tensor) for name, tensor in tensors if name not in of_pairs]
        self.run: Callable[[Tensor], Tensor] = self.graph
        if compilation.is_wanted():
            self.run = compilation.Compiled(self.graph, _name(network))

    def __call__(self, images: Tensor) -> Tensor:
        return self.run(images.contiguous(memory_format=self.layout))

    def plain(self, images: Tensor) -> Tensor:
        """The answer without compiling."""
        return self.graph(images.contiguous(memory_format=self.layout))  # type: ignore[no-any-return]

    @torch.no_grad()
    def refresh(self, network: nn.Module) -> None:
        """Take over the weights and statistics that `network` has now."""
        for name, tensor in self.rest:
            tensor.copy_(_tensor(network, name))
        for conv_name, norm_name in self.pairs.items():
            target: Any = self.graph.get_submodule(conv_name)
            conv: Any = network.get_submodule(conv_name)
            norm: Any = network.get_submodule(norm_name)
            scale = torch.rsqrt(norm.running_var + norm.eps)
            if norm.affine:
                scale = scale * norm.weight
            shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
            per_output = (-1, *[1] * (conv.weight.dim() - 1))
            torch.mul(conv.weight, scale.view(per_output), out=target.weight)
            target.bias.copy_(shift * scale + norm.bias if norm.affine else shift * scale)


@dataclass(frozen=True)
class _Fingerprint:
    """Which modules a copy was made of; held weakly, so that it keeps no network alive."""

    modules: tuple[weakref.ref[nn.Module], ...]
    place: tuple[Any, ...]

    @classmethod
    def of(cls, network: nn.Module, channels_last: bool) -> _Fingerprint:
        return cls(
            tuple(weakref.ref(module) for module in network.modules()),
            _place(network, channels_last),
        )

    def still_holds(self, network: nn.Module, channels_last: bool) -> bool:
        modules = list(network.modules())
        return (
            len(modules) == len(self.modules)
            and all(ref() is module for ref, module in zip(self.modules, modules, strict=True))
            and self.place == _place(network, channels_last)
        )


def _place(network: nn.Module, channels_last: bool) -> tuple[Any, ...]:
    first = next(network.parameters(), None)
    where = None if first is None else (first.device, first.dtype)
    return where, channels_last, _is_hooked(network), compilation.is_wanted()


def _is_hooked(network: nn.Module) -> bool:
    """Whether somebody watches a layer: of a folded one there would be nothing right to see."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@dataclass(frozen=True)
class _Plain:
    """The decision to lend a network itself."""

    built_from: _Fingerprint


# Kept beside the networks: nothing appears in their modules, state dicts, copies or pickles.
_copies: weakref.WeakKeyDictionary[nn.Module, _Folded | _Plain] = weakref.WeakKeyDictionary()


def _folded(network: nn.Module, images: Tensor) -> _Folded | None:
    """The folded copy of `network` at its present weights, or None where it has none."""
    channels_last = prefers_channels_last(network, min(images.shape[-2:]))
    known = _copies.get(network)
    if known is None or not known.built_from.still_holds(network, channels_last):
        known = _copies[network] = _decide(network, images, channels_last)
    elif isinstance(known, _Folded):
        known.refresh(network)
    return known if isinstance(known, _Folded) else None


def _decide(network: nn.Module, images: Tensor, channels_last: bool) -> _Folded | _Plain:
    plain = _Plain(_Fingerprint.of(network, channels_last))
    normalized = any(isinstance(module, _BatchNorm) for module in network.modules())
    if not normalized and not compilation.is_wanted():
        return plain
    if _is_hooked(network):
        log.info("%s has hooks: it is neither folded nor compiled", _name(network))
        return plain
    try:
        folded = _Folded(network, channels_last)
    except Exception as error:  # tracing runs the network's own code on stand-ins for tensors
        log.info("%s cannot be traced, so it is neither folded nor compiled: %s",
                 _name(network), error)  # fmt: skip
        return plain
    if not folded.pairs and not compilation.is_wanted():
        return plain
    folded.refresh(network)
    difference = _difference(network, folded, images[:_CHECKED_IMAGES])
    if not difference <= _TOLERANCE.get(images.device.type, _TOLERANCE_ELSEWHERE):
        log.warning(
            "%s: folded and plain logits differ by %.1e of the largest, so its BatchNorm is not "
            "folded", _name(network), difference,
        )  # fmt: skip
        return plain
    return folded


def _difference(network: nn.Module, folded: _Folded, images: Tensor) -> float:
    """The largest difference of logits over the largest logit, without autocast."""
    with _still(network), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        plain = network(images)
        gap = (folded.plain(images) - plain).abs().max()
    return float(gap / plain.abs().max().clamp_min(1e-6))


class _Tracer(fx.Tracer):
    """Stops at BatchNorm and at what timm marks as not to be traced."""

    proxy_buffer_attributes = True  # else a buffer's value would be baked in

    def __init__(self) -> None:
        functions = tuple(f for f in get_notrace_functions() if callable(f))
        super().__init__(autowrap_functions=functions)
        self.leaves = (_BatchNorm, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def _trace(network: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """A copy of `network` as a graph, BatchNorms gone where they follow a convolution alone, and
    the names of the pairs: convolution -> BatchNorm. Its folded weights are not set yet.

    Raises whatever tracing raises, and ValueError for tensors that `refresh` could not find again.
    """
    with _still(network):
        graph = copy.deepcopy(fx.GraphModule(network, _Tracer().trace(network)))
        graph.eval().requires_grad_(False)
    for name, _ in [*graph.named_parameters(), *graph.named_buffers()]:
        _tensor(network, name)
    pairs = _pairs(graph)
    for conv_name, norm_name in pairs.items():
        conv, norm = graph.get_submodule(conv_name), graph.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if conv.bias is None:
            bias = conv.weight.new_zeros(conv.out_channels)
            conv.bias = nn.Parameter(bias, requires_grad=False)
        rest: nn.Module = nn.Identity()
        if isinstance(norm, BatchNormAct2d | SyncBatchNormAct):
            rest = nn.Sequential(norm.drop, norm.act)
        parent, _, child = norm_name.rpartition(".")
        setattr(graph.get_submodule(parent), child, rest.eval())
    return graph, pairs


def _pairs(graph: fx.GraphModule) -> dict[str, str]:
    """Convolutions whose one user is a BatchNorm with running statistics, both called once."""
    modules = {n: graph.get_submodule(str(n.target)) for n in graph.graph.nodes
               if n.op == "call_module"}  # fmt: skip
    calls = Counter(id(module) for module in modules.values())
    pairs = {}
    for node, norm in modules.items():
        before = node.args[0] if node.args else None
        conv = modules.get(before) if isinstance(before, fx.Node) else None
        if (
            isinstance(norm, _BatchNorm)
            and norm.running_var is not None
            and type(conv) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
            and isinstance(before, fx.Node)
            and len(before.users) == calls[id(conv)] == calls[id(norm)] == 1
        ):
            pairs[str(before.target)] = str(node.target)
    return pairs


def _tensor(network: nn.Module, name: str) -> Tensor:
    parent, _, child = name.rpartition(".")
    tensor = getattr(network.get_submodule(parent), child, None)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is no tensor of {_name(network)}")
    return tensor


def _name(network: nn.Module) -> str:
    return str(getattr(network, "architecture", type(network).__name__))
