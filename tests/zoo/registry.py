"""The table of specimens and what they share: a seed, batch norms with statistics that matter, an example input."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLASSES = 5
"""Logits of every specimen with one output."""

IMAGE = (4, 3, 8, 8)
"""Shape of the example input of most specimens."""

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Specimen:
    """A tiny network that some way of making it fast could get wrong.

    Attributes:
        name: what test ids show.
        make: builds the network; `build` adds the seed and the statistics.
        shapes: of the example inputs, batch first.
        folds: whether no batch norm operator may be left on the fast path.
        coupled: whether the samples of a batch see each other, also in eval mode.
        warns: whether wrapping or the first run warns once: a fold that had to be undone, a wrapper that is taken off.
        change: changes the function without touching a tensor (a flag, a replaced layer).
    """

    name: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    folds: bool = True
    coupled: bool = False
    warns: bool = False
    change: Callable[[nn.Module], None] | None = None

    def build(self) -> nn.Module:
        """The network in eval mode, the same one at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
            give_statistics(model)
        return model.eval()

    def example(self, seed: int = 1) -> tuple[Tensor, ...]:
        """Inputs of `shapes`, uniform in [0, 1]."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.rand(shape, generator=generator) for shape in self.shapes)


ZOO: dict[str, Specimen] = {}
"""Every specimen by its name, in the order of registration."""


def register(
    *shapes: tuple[int, ...],
    folds: bool = True,
    coupled: bool = False,
    warns: bool = False,
    change: Callable[[nn.Module], None] | None = None,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Enter what the decorated function or class makes into `ZOO`, under its own name; see `Specimen`."""

    def enter(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = make.__name__
        if name in ZOO:
            raise ValueError(f"expected a new name, got {name!r}, which is taken; rename it")
        ZOO[name] = Specimen(name, make, shapes or (IMAGE,), folds, coupled, warns, change)
        return make

    return enter


@torch.no_grad()
def give_statistics(model: nn.Module) -> None:
    """Random running statistics and affine weights, negative ones too, for every norm layer of `model`."""
    for module in model.modules():
        if not isinstance(module, _NORMS):
            continue
        if isinstance(module.weight, Tensor):
            signs = torch.where(torch.rand(module.weight.shape) < 0.25, -1.0, 1.0)
            module.weight.copy_(signs * torch.empty_like(module.weight).uniform_(0.6, 1.4))
        if isinstance(module.bias, Tensor):
            module.bias.normal_(0, 0.3)
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.normal_(0, 0.3)
            variance.uniform_(0.3, 2.0)


class Pool(nn.Module):
    """Mean over all dimensions but the first two."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to (N, C)."""
        return x.flatten(2).mean(2)


def classifier(*layers: nn.Module, channels: int) -> nn.Sequential:
    """`layers`, then the mean over space, then a linear head on `channels` features."""
    return nn.Sequential(*layers, Pool(), nn.Linear(channels, CLASSES))


class Headed(nn.Module):
    """Base of specimens with a `forward` of their own: ends in a mean over space and a linear head."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.head = nn.Linear(channels, CLASSES)

    def classify(self, features: Tensor) -> Tensor:
        """Features (N, channels, ...) to logits (N, CLASSES)."""
        logits: Tensor = self.head(features.flatten(2).mean(2))
        return logits
