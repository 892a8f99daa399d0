"""Are a network's values a steady function of its input alone? One pass of it shows.

Where an operator jumps (rounding, comparing, choosing the largest), a difference in the last digit may become one of
any size, and an attack that searches for a border searches for such a place. A state that a pass leaves behind may
decide what a later one gives, and random numbers that are drawn twice are others for all that draw afterwards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..engines import frozen_attributes
from ..modules import OperatorMode, are_equal, generator_states, holds_generator, modules_of

_JUMP = {
    *("sign", "sgn", "copysign", "round", "floor", "ceil", "trunc", "fix", "frac", "fmod", "remainder"),
    *("floor_divide", "heaviside", "hardshrink", "histc", "_local_scalar_dense", "item"),  # code may compare numbers
}
_JUMP_BY_PREFIX = ("fake_quantize", "_fake_quantize", "fused_moving_avg", "_fused_moving_avg")
"""Operators that jump though they give floating numbers, or no tensor."""

_DO_NOT = {"max", "min", "isnan", "isinf", "isfinite"}
"""Operators that do not, though they give integers or truth values too, unless the places are used."""


@dataclass
class Steadiness:
    """What one pass has shown.

    Attributes:
        jumps: name of an operator that does; empty if none was seen.
        keeps: whether the network has set attributes, or written into buffers.
        draws: whether it has drawn random numbers, or has a generator of its own.
    """

    jumps: str = ""
    keeps: bool = False
    draws: bool = False

    @property
    def steady(self) -> bool:
        """Whether nothing speaks against it."""
        return not (self.jumps or self.keeps or self.draws)


@contextmanager
def watching_steadiness(network: nn.Module, device: torch.device) -> Iterator[Steadiness]:
    """Run the network once inside, on this device; what is handed out is filled in at the end."""
    found = Steadiness()
    attributes, versions, drawn = frozen_attributes(network), _versions(network), generator_states(device)
    with _Jumps() as mode:
        yield found
    found.jumps = mode.found
    now = frozen_attributes(network)
    same = all(are_equal(now[name], attributes.get(name, {})) for name in now)
    found.draws = holds_generator(network) or generator_states(device) != drawn
    found.keeps = not same or _versions(network) != versions


class _Jumps(OperatorMode):
    """Looks for an operator that jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ""
        self._places: dict[int, Tensor] = {}  # of the largest, say: as long as nobody uses them, they decide nothing

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        given = [] if self.found else _tensors((args, kwargs))
        name = func.overloadpacket.__name__.removesuffix("_")
        if any(id(t) in self._places for t in given):
            self.found = name
        elif any(t.is_floating_point() for t in given):
            if _jumps(name, func, args) or _decides(name, output):
                self.found = name
            self._places |= {id(t): t for t in _tensors(output) if t.dtype == torch.int64}
        return output


def _jumps(name: str, func: Any, args: Any) -> bool:
    """Whether the operator does with these arguments."""
    if name == "threshold":
        return bool(args[1] != args[2])
    if name.startswith("grid_sampler"):
        return bool(args[2] == 1)  # the nearest pixel
    rounds = name == "div" and func._overloadname.endswith("_mode")
    return rounds or name in _JUMP or name.startswith(_JUMP_BY_PREFIX)


def _decides(name: str, output: Any) -> bool:
    """Whether floating numbers became places, truth values or integers; the places of a pooling serve its gradient."""
    if name in _DO_NOT or "pool" in name:
        return False
    return any(not (t.is_floating_point() or t.is_complex()) for t in _tensors(output))


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _versions(network: nn.Module) -> list[int]:
    held = [t for part in modules_of(network) for t in (*part._buffers.values(), *vars(part).values())]
    return [t._version for t in held if isinstance(t, Tensor) and not t.is_inference()]
