"""Purifier: an image-to-image network before a classifier that stays as it was.

The network is our choice; nothing of the published one is known. It works in [0, 1], is fully
convolutional and deterministic, and has neither BatchNorm (adversarial and clean statistics would
mix, and the mode would change the attack) nor a skip at full resolution (reconstructing x from x
would be solved by the identity). With C3(i -> o, s) = 3x3 convolution, GroupNorm(8), ReLU:

    encoder  C3(3 -> w)  C3(w -> 2w, s2)  C3(2w -> 4w, s2)  n x Res(4w)  conv1x1(4w -> b)
    decoder  conv1x1(b -> 4w)  nearest x2  C3(4w -> 2w)  nearest x2  C3(2w -> w)  conv3x3(w -> 3)
             sigmoid

A purified model at rest is a folder: `purifier.safetensors`, whose header describes both networks,
and `classifier/` as `models.save` leaves it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.nn.functional import pad

from robustify.classifier import Classifier, describe
from robustify.errors import ModelError, UsageError
from robustify.files import atomic_write
from robustify.frozen import Frozen, weights_hash
from robustify.weights import HEADER_KEY, PURIFIER_FILE, read_safetensors

SIZES = {"teacher": (64, 4), "student": (32, 2), "tiny": (16, 1)}  # name -> w, n
GROUPS = 8  # of every GroupNorm

Size = Literal["teacher", "student", "tiny"] | tuple[int, ...]
Routing = Literal["routed", "clean_target", "average"]


class Purifier(nn.Module):
    """(N, C, H, W) images in [0, 1] -> images of the same shape in [0, 1].

    `size` is a name, (w, n) or (w, n, b). By default the code of b channels at a quarter of the
    side is 2/3 of the image for colour and 1/2 for grey: a wider one forces nothing out.
    """

    def __init__(self, in_chans: int, size: Size = "student") -> None:
        super().__init__()
        width, blocks, code = dimensions(size, in_chans)
        self.in_chans, self.width, self.blocks, self.code = in_chans, width, blocks, code
        self.encoder = nn.Sequential(
            _conv3(in_chans, width),
            _conv3(width, 2 * width, stride=2),
            _conv3(2 * width, 4 * width, stride=2),
            *(_Residual(4 * width) for _ in range(blocks)),
            nn.Conv2d(4 * width, code, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code, 4 * width, 1),
            nn.Upsample(scale_factor=2),
            _conv3(4 * width, 2 * width),
            nn.Upsample(scale_factor=2),
            _conv3(2 * width, width),
            nn.Conv2d(width, in_chans, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Purified images; the sigmoid ends it, with no clamp and no rounding."""
        restored = self.decoder(self.encoder(_padded(images)))
        return restored[..., : images.shape[-2], : images.shape[-1]]  # type: ignore[no-any-return]


def dimensions(size: Size, in_chans: int) -> tuple[int, int, int]:
    """(w, n, b) of a size for images of `in_chans` channels. Raises `UsageError`."""
    numbers = SIZES[size] if isinstance(size, str) else size
    if not 2 <= len(numbers) <= 3 or min(numbers) < 1 or numbers[0] % GROUPS:
        raise UsageError(
            f"expected a purifier's size of {', '.join(SIZES)}, or [width, blocks] or [width, "
            f"blocks, code] with a width divisible by {GROUPS}, got {list(numbers)}"
        )
    default_code = 8 if in_chans == 1 else 32 * in_chans // 3
    width, blocks, code = (*numbers, default_code)[:3]
    return width, blocks, code


class _Residual(nn.Module):
    """c + two C3, the last ReLU after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv3(channels, channels)
        self.second = _conv3(channels, channels)[:2]

    def forward(self, code: Tensor) -> Tensor:
        return torch.relu(code + self.second(self.first(code)))


def _conv3(incoming: int, outgoing: int, *, stride: int = 1) -> nn.Sequential:
    """C3 of the formula."""
    convolution = nn.Conv2d(incoming, outgoing, 3, stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, outgoing), nn.ReLU())


def _padded(images: Tensor) -> Tensor:
    """Reflected at the right and below until both sides are multiples of 4."""
    below, right = -images.shape[-2] % 4, -images.shape[-1] % 4
    return pad(images, (0, right, 0, below), mode="reflect") if below or right else images


torch.fx.wrap("_padded")  # its condition cannot be traced, and need not be: `robustify.fold`


class Purified(Classifier):
    """A purifier before a frozen classifier, as one classifier: logits f(g(x)) of images in [0, 1].

    `classifier` keeps its own normalization, stays in eval mode whatever `train` is called, has no
    parameter gradients, and hashes to `sha256` as long as nobody touched it; gradients flow through
    it to the purifier and the images. `about` is what was recorded about the pair.
    """

    def __init__(
        self,
        purifier: nn.Module,
        classifier: Classifier,
        *,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(classifier, Purified):
            raise UsageError("expected a bare classifier, got a purified one; name the one inside")
        nothing, one = (0.0,) * classifier.in_chans, (1.0,) * classifier.in_chans
        recorded = {"data": classifier.data} if classifier.data else {}
        super().__init__(
            _Pair(purifier, classifier),
            architecture=f"purifier+{classifier.architecture}",
            image_size=classifier.image_size,
            mean=nothing,  # images go to the purifier as they are: (x - 0) / 1 is x to the bit
            std=one,
            class_names=classifier.class_names,
            about={**recorded, **(about or {})},
        )
        self.sha256 = weights_hash(classifier)

    @property
    def purifier(self) -> nn.Module:
        """The image-to-image network: all that is trained."""
        return self.module.purifier  # type: ignore[return-value]

    @property
    def classifier(self) -> Classifier:
        """The classifier alone."""
        return self.module.classifier.network  # type: ignore[union-attr, return-value]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and last feature map of the classifier, for purified images."""
        return self.classifier.features(self.purifier(images))

    def keep_classes(self, rows: Sequence[int]) -> None:
        """Raise `ModelError`: the classifier stays as it is."""
        raise ModelError(
            "expected data with the classes of the purified classifier in their order, "
            f"{self.class_names}; choose other data, or reorder the classifier and attach the "
            "purifier to it"
        )

    def require_untouched(self) -> None:
        """Raise `ModelError` unless the classifier's weights and buffers are as they were."""
        if (now := weights_hash(self.classifier)) != self.sha256:
            raise ModelError(
                f"expected the classifier behind the purifier to be untouched, but its hash went "
                f"from {self.sha256[:16]} to {now[:16]}; this is an error in the training"
            )


class _Pair(nn.Module):
    """What stands where a classifier has its bare network."""

    def __init__(self, purifier: nn.Module, classifier: Classifier) -> None:
        super().__init__()
        self.purifier = purifier
        self.classifier = Frozen(classifier)
        self.num_classes, self.in_chans = classifier.num_classes, classifier.in_chans

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.purifier(images))  # type: ignore[no-any-return]


class Ensemble(nn.Module):
    """Two teachers of a purifier, frozen as they are now, and who answers for what.

    `routing` says what A is asked for S(images_adv): `routed` these images, `clean_target` the
    clean ones; `average` takes (A + N) / 2. N answers for S(images). One alone takes both parts.
    """

    def __init__(self, adversarial: nn.Module, normal: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.adversarial, self.normal = (
            Frozen(copy.deepcopy(teacher)) for teacher in (adversarial, normal)
        )
        self.routing = routing

    @classmethod
    def of(cls, taught: Mapping[str, Purified], routing: Routing) -> Ensemble | None:
        """The teachers called `adversarial` and `normal`, as far as there are any."""
        found = [taught[role].purifier for role in ("adversarial", "normal") if role in taught]
        return cls(found[0], found[-1], routing) if found else None

    @torch.no_grad()
    def targets(self, images_adv: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Target images for S(images_adv) and for S(images)."""
        if self.routing == "average":
            both = [(self.adversarial(x) + self.normal(x)) / 2 for x in (images_adv, images)]
            return both[0], both[1]
        asked = images_adv if self.routing == "routed" else images
        return self.adversarial(asked), self.normal(images)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """(N,) mean over channels and pixels: the same weight for every image size."""
    return (a - b).square().flatten(1).mean(1)


def facts(purified: Purified) -> dict[str, Any]:
    """What a record, a report and the saved header say about a pair: plain values."""
    purifier, classifier = purified.purifier, purified.classifier
    if not isinstance(purifier, Purifier):
        raise ModelError(f"expected a Purifier to describe, got {type(purifier).__name__}")
    return {
        "purifier": {
            key: getattr(purifier, key) for key in ("in_chans", "width", "blocks", "code")
        },
        "classifier": {
            "id": classifier.about.get("base") or classifier.architecture,
            "sha256": purified.sha256,
            "untouched": weights_hash(classifier) == purified.sha256,
            **describe(classifier),
        },
    }


def write_purifier(purified: Purified, path: Path, about: Mapping[str, Any]) -> None:
    """Write the purifier alone, float32, its header describing both networks and `about`.

    Raises `ModelError` for weights that are not finite and for a classifier that was touched.
    """
    purified.require_untouched()
    state = purified.purifier.state_dict()
    plain = {key: tensor.detach().cpu().float().contiguous() for key, tensor in state.items()}
    if not all(tensor.isfinite().all() for tensor in plain.values()):
        raise ModelError("expected a purifier with finite weights to save, got NaN or infinity")
    recorded = {**facts(purified), "about": {**purified.about, **about}}
    header = {"format": "pt", HEADER_KEY: json.dumps(recorded, sort_keys=True, ensure_ascii=False)}
    atomic_write(path, serialize(plain, header))


def purifier_file(name: str | Path) -> Path | None:
    """The purifier's file, if `name` is one or a folder that holds one."""
    path = Path(str(name).removeprefix("local-dir:"))
    file = path / PURIFIER_FILE if path.is_dir() else path
    return file if file.name == PURIFIER_FILE and file.is_file() else None


@dataclass(frozen=True)
class SavedPurifier:
    """A purifier at rest: the network, what classifier it was trained before, what was recorded."""

    path: Path
    purifier: Purifier
    classifier: Mapping[str, Any]
    about: Mapping[str, Any]

    def join(self, classifier: Classifier, *, force: bool = False) -> Purified:
        """The pair as it was saved. Raises `ModelError` for a classifier of other weights or
        normalization: robustness belongs to the pair. `force` marks the pair as transferred."""
        own = {"sha256": weights_hash(classifier), **describe(classifier)}
        differs = [key for key in ("sha256", "mean", "std") if own[key] != self.classifier.get(key)]
        if not differs:
            return Purified(self.purifier, classifier, about=self.about).eval()
        if not force:
            key = differs[0]
            raise ModelError(
                f"expected the classifier that {self.path} was trained before, {key} "
                f"{_short(self.classifier.get(key))}, got another, {_short(own[key])}; put the "
                "purifier before it with robustify attach, or load it with force=True"
            )
        return self.transfer(classifier)

    def transfer(self, classifier: Classifier) -> Purified:
        """The purifier before another classifier: no number of the old pair holds for it.

        Raises `ModelError` for a classifier of images with another number of channels.
        """
        if classifier.in_chans != self.purifier.in_chans:
            raise ModelError(
                f"expected a classifier of images with {self.purifier.in_chans} channels, which is "
                f"what {self.path} purifies, got {classifier.architecture} for "
                f"{classifier.in_chans}; choose another classifier or another purifier"
            )
        kept = {k: v for k, v in self.about.items() if k not in ("selection", "data")}
        trained = {key: self.classifier.get(key) for key in ("id", "sha256", "image_size")}
        return Purified(
            self.purifier, classifier, about={**kept, "transferred": {"trained_before": trained}}
        ).eval()


def _short(value: Any) -> str:
    return value[:16] if isinstance(value, str) else str(value)


def read_purifier(path: Path) -> SavedPurifier:
    """Read a purifier's file, without any classifier. Raises `ModelError`."""
    weights, header = read_safetensors(path)
    try:
        recorded = json.loads(header[HEADER_KEY])
        shape, classifier = recorded["purifier"], dict(recorded["classifier"])
        numbers: Sequence[int] = [int(shape[key]) for key in ("width", "blocks", "code")]
        purifier = Purifier(int(shape["in_chans"]), tuple(numbers))
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise ModelError(
            f"expected {path} to describe a purifier in its header, but that is damaged or missing "
            f"({error}); take the file that robustify distill left"
        ) from None
    try:
        purifier.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"expected the weights of a purifier in {path}, but: {reason}") from None
    return SavedPurifier(path, purifier.eval(), classifier, recorded.get("about") or {})
