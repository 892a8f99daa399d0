"""Activations in place, where that follows from the structure alone.

A trace does not prove it: it shows neither ``x is None`` nor what a later call does, and a second reader of what an
activation reads would see it changed, silently. So code of the user's is left alone. In a sequence of layers that runs
``nn.Sequential``'s own forward, what passes from one layer to the next is seen by nobody else. There an activation
runs in place if what comes before it gives a tensor of its own and does not read it again in its backward pass. The
same activation called from anywhere else runs as ever.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..modules import become, has_hooks, kind_of, modules_of
from .parts import Affine, Skipped
from .tracing import DOES_NOTHING

# Those whose gradient PyTorch reads off the output, bit for bit. Not ReLU6 and Hardtanh, which copy their input first.
# Not ELU and its kin: alpha * exp(x) = output + alpha loses its digits where x is far below zero.
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)

# Not Linear, whose output on sequences is a view: in place, autograd would copy more than is spared.
_FRESH = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.GroupNorm)


class _InPlace:
    """Mixin for a second module on the attributes of an activation, hooks included, which runs in place."""

    inplace = property(lambda self: True)


class _Sequence:
    """Mixin for a sequence of layers that calls some of its activations in place.

    Attributes:
        layers: its layers when this was decided; where they have changed since, it runs as ever.
        called: the same with those activations in place.
    """

    layers: tuple[nn.Module, ...] = ()
    called: tuple[nn.Module, ...] = ()

    def forward(self, input: Any) -> Any:
        if tuple(self) != self.layers:  # type: ignore[arg-type]
            return super().forward(input)  # type: ignore[misc]
        for part in self.called:
            input = part(input)
        return input


def run_in_place(network: nn.Module) -> list[nn.Module]:
    """Have sequences of layers in a copy call activations in place where nobody can tell; returns the activations."""
    plain = [part for part in modules_of(network) if _is_plain(part)]
    chosen = {part: set(_places(part)) for part in plain}  # type: ignore[arg-type]
    found: dict[nn.Module, None] = {}
    for part, places in chosen.items():
        layers: tuple[nn.Module, ...] = tuple(part)  # type: ignore[arg-type]
        if places:
            called = tuple(_second(layer) if place in places else layer for place, layer in enumerate(layers))
            become(part, _Sequence)
            vars(part).update(layers=layers, called=called)
            found.update(dict.fromkeys(layers[place] for place in places))
    return list(found)


def _second(activation: nn.Module) -> nn.Module:
    second = nn.Module.__new__(type(activation))
    second.__dict__ = vars(activation)
    become(second, _InPlace)
    return second


def _is_plain(part: nn.Module) -> bool:
    """Whether a module runs its layers one after the other, and does nothing else."""
    if not isinstance(part, nn.Sequential):
        return False
    names = ("forward", "__iter__", "__call__", "__getattr__", "__eq__")
    return all(getattr(type(part), name) is getattr(nn.Sequential, name) for name in names)


def _places(layers: Iterable[nn.Module]) -> Iterator[int]:
    """The places of activations that may run in place; ``own`` follows what the last layer gave."""
    own = False
    for place, part in enumerate(layers):
        if own and _may_run_in_place(part):
            yield place
        own = _gives_own(part, own)


def _may_run_in_place(part: nn.Module) -> bool:
    if kind_of(part) not in _ACTIVATIONS or part.inplace or has_hooks(part):
        return False
    return not isinstance(part, nn.LeakyReLU) or part.negative_slope >= 0


def _gives_own(part: nn.Module, own: bool) -> bool:
    """Whether a layer gives a tensor that nobody else reads, its own backward pass included."""
    if has_hooks(part):
        return False
    if isinstance(part, Skipped) or kind_of(part) in DOES_NOTHING:
        return own
    if _is_plain(part):
        for inner in part:  # type: ignore[attr-defined]
            own = _gives_own(inner, own)
        return own
    return kind_of(part) in _FRESH or isinstance(part, Affine)
