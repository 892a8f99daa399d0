"""The networks that the benchmark attacks, at the sizes of a GPU, of two processor cores, and of a test."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.shared.networks import VisionTransformer, WideResNet, resnet18, resnet50, settle_statistics

Size = Literal["full", "small", "tiny"]


@dataclass(frozen=True)
class Case:
    """One network at one size.

    Attributes:
        key: its name in options; a second size of the same network has a key of its own.
        label: its name in tables.
        build: makes it, untrained.
        image: height and width of its images.
        batch: images per attack.
        weight: its part of the time, against that of the others.
    """

    key: str
    label: str
    build: Callable[[], nn.Module]
    image: int
    batch: int
    weight: float = 1.0

    @property
    def title(self) -> str:
        """Name and sizes."""
        return f"{self.label}, 3x{self.image}x{self.image}, batch {self.batch}"

    def make(self, device: torch.device, *, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
        """The network in eval mode, images, and as labels the classes that it gives them."""
        torch.manual_seed(seed)
        x = torch.rand(self.batch, 3, self.image, self.image).to(device)
        model = settle_statistics(self.build().to(device), x[:64])
        with torch.no_grad():
            return model, x, model(x).argmax(1)


def resnet18_case(*, width: int = 64, image: int = 32, batch: int) -> Case:
    """ResNet-18 for small images, which stands first everywhere."""
    return Case("resnet18", f"ResNet-18 of width {width}", partial(resnet18, width=width), image, batch)


def wide_case(*, depth: int = 28, width: int = 10, image: int = 32, batch: int) -> Case:
    """A wide residual network."""
    return Case("wrn", f"WRN-{depth}-{width}", partial(WideResNet, depth=depth, width=width), image, batch)


def resnet50_case(*, width: int = 64, image: int = 224, batch: int) -> Case:
    """ResNet-50 with a thousand classes."""
    return Case("resnet50", f"ResNet-50 of width {width}", partial(resnet50, width=width), image, batch)


def vit_case(*, width: int = 384, depth: int = 12, heads: int = 6, image: int = 224, batch: int) -> Case:
    """A vision transformer; the defaults are ViT-S/16."""
    label = "ViT-S/16" if (width, depth, heads) == (384, 12, 6) else f"ViT of width {width}, depth {depth}"
    build = partial(VisionTransformer, image=image, width=width, depth=depth, heads=heads)
    return Case("vit", label, build, image, batch)


def cases(size: Size, *, width: int | None = None, batch: int | None = None) -> tuple[Case, ...]:
    """All networks at a size; `width` and `batch` are the ResNet-18's, where others than usual are asked for."""
    first = resnet18_case(width=width or 64, batch=batch or (128 if size == "full" else 32))
    if size == "full":
        larger = replace(resnet18_case(batch=512), key="resnet18-512")
        return replace(first, weight=2.5), wide_case(batch=512), resnet50_case(batch=256), vit_case(batch=256), larger
    if size == "small":
        others = wide_case(width=4, batch=8), resnet50_case(image=96, batch=4), vit_case(image=112, batch=4)
        return replace(first, weight=6.0), *others
    first = resnet18_case(width=width or 8, image=16, batch=batch or 4)
    wide, vit = wide_case(depth=10, width=1, image=16, batch=2), vit_case(width=32, depth=2, heads=2, image=32, batch=2)
    return first, wide, resnet50_case(width=8, image=32, batch=2), vit


@dataclass(frozen=True)
class Scale:
    """What else depends on the size: of the other networks, of the yardsticks, and the time.

    Attributes:
        images: test images of the digits network.
        epochs: of its training.
        early_steps: steps of the attacks whose early stop is counted.
        wide: depth and width of the wide network that is updated.
        memory_width: width of the ResNet-18 whose memory is counted.
        rounds: updates and attacks while memory is watched.
        sweep: the largest batch of the sweep.
        matrix_size: rows and columns of the matrices whose product is the yardstick.
        mebibytes: size of the copy that is the other.
        minutes: that all may take.
    """

    images: int
    epochs: int
    early_steps: int
    wide: tuple[int, int]
    memory_width: int
    rounds: int
    sweep: int
    matrix_size: int
    mebibytes: int
    minutes: float


SCALES: dict[Size, Scale] = {
    "full": Scale(200, 20, 50, (28, 10), 64, 200, 1024, 8192, 1024, 4.5),
    "small": Scale(100, 20, 50, (28, 10), 64, 200, 64, 2048, 256, 19.0),
    "tiny": Scale(8, 1, 2, (10, 1), 8, 4, 2, 64, 1, 5.0),
}
