"""How a tensor of the fast network follows the wrapped model: in place, into storage that stays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules import HALF, Precision, clone, write
from .scales import Scales
from .writing import Writing, parameter_like, room_for

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

ScaleAndShift = dict[torch.dtype, Tensor]
"""A batch norm frozen: for each dtype that its input is expected to have, the widest first, (2, channels)."""


class Refresh(Protocol):
    """Something of the fast network that follows the wrapped model, without new storage."""

    def __call__(self) -> None:
        """Read the wrapped model's tensors and write the network's own in place."""


@dataclass
class CopyTensor:
    """Follow one tensor as it is."""

    theirs: dict[str, Any]
    ours: dict[str, Any]
    name: str
    writing: Writing | None = None

    def __post_init__(self) -> None:
        self.own: Tensor = self.ours[self.name]

    def widen(self) -> None:
        """Hold the tensor in full precision from now on, in storage of its own."""
        if self.own.dtype in HALF:
            self.own, self.writing = clone(self.own.float()), None
            self.own = parameter_like(self.own, self.ours[self.name])
            with torch.no_grad():
                self()

    def __call__(self) -> None:
        """Copy, into the same tensor even where a forward pass of the network has put another in its place."""
        theirs = self.theirs[self.name]
        if self.own.shape != theirs.shape:  # that pass has resized it
            self.own = clone(theirs.to(self.own.dtype))
        self.ours[self.name] = self.own
        if theirs.layout is not torch.strided:
            if not write(self.own, theirs):
                self.ours[self.name] = self.own = clone(theirs.to(self.own.dtype))
            return
        if self.writing is None or not self.writing.is_between(theirs, self.own):
            self.writing = Writing(theirs, self.own)
        self.writing()


@dataclass
class ReplaceTensor:
    """Follow a buffer or an attribute, as a stored activation: its shape may change, and the network replace it."""

    theirs: dict[str, Any]
    ours: dict[str, Any]
    name: str
    dtype: torch.dtype
    own: Tensor | None = None

    def __call__(self) -> None:
        """Copy in place, or clone where another tensor, or none, is in that place (which somebody else may hold)."""
        theirs, own = self.theirs[self.name], self.own
        if own is None or self.ours.get(self.name, theirs) is not own or not write(own, theirs):
            self.ours[self.name] = self.own = clone(theirs.to(self.dtype))


class CopyHeld:
    """Follow tensors that only containers hold, or objects that are data.

    Args:
        theirs: the wrapped model's.
    """

    def __init__(self, theirs: list[Tensor]) -> None:
        self._wanted = set(map(id, theirs))
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def note(self, theirs: Tensor, ours: Tensor) -> Tensor:
        """Take down what one of them becomes in a copy; returns that."""
        if id(theirs) in self._wanted:
            self._pairs.append((theirs, ours))
        return ours

    def __call__(self) -> None:
        """Copy in place."""
        for theirs, ours in self._pairs:
            write(ours, theirs)


@dataclass
class Fold:
    """A layer with the batch norm behind it, and the tensors that hold both."""

    layer: nn.Module
    norm: _BatchNorm
    weight: Tensor
    bias: Tensor
    writing: Writing | None = None

    def prepare(self, scale: Tensor, shift: Tensor, room: Tensor) -> Writing:
        """Bring the bias up to date with the layer and the batch norm; returns what does so with the weight.

        Args:
            scale: what the batch norm is in eval mode, one per channel; in the same memory in each call, for the plan
                reads it there.
            shift: likewise, but anywhere.
            room: for the plan.
        """
        weight, bias = self.layer.weight, self.layer.bias
        if self.writing is None or not self.writing.is_between(weight, self.weight):  # type: ignore[arg-type]
            by, split = _along_outputs(self.layer, scale)
            self.writing = Writing(weight, self.weight, by, split=split, room=room)  # type: ignore[arg-type]
        if bias is not None:
            shift = torch.addcmul(shift, scale, bias)  # type: ignore[arg-type]
        self.bias.copy_(shift)
        return self.writing


class FollowNorms:
    """Follow all batch norms that are folded into a layer or frozen into a scale and a shift.

    Args:
        folds: those that are folded.
        frozen: the others, each with a dict, empty as yet, that is given the norm's part of one tensor per dtype.
        precision: of the network.

    Attributes:
        frozen: each frozen norm with its scale and shift, (2, channels), as they are computed.
        centred: what is done to these before they are handed on.
    """

    def __init__(self, folds: list[Fold], frozen: list[tuple[_BatchNorm, ScaleAndShift]], precision: Precision) -> None:
        self._scales = Scales([*(fold.norm for fold in folds), *(norm for norm, _ in frozen)], at_least=precision.base)
        split = self._scales.now.split(self._scales.channels, dim=1)
        self._folds = list(zip(folds, split[: len(folds)], strict=True))
        self._room = room_for(fold.weight for fold in folds)
        channels = self._scales.channels[len(folds) :]
        self.frozen = [(norm, part) for (norm, _), part in zip(frozen, split[len(folds) :], strict=True)]
        self.centred: list[Callable[[], None]] = []
        self._scales_of_frozen = self._scales.now[:, self._scales.now.shape[1] - sum(channels) :]
        dtypes = dict.fromkeys((precision.base, precision.dtype))  # that inputs of batch norms have; the widest first
        self._own = [torch.empty(2, sum(channels), dtype=dtype, device=precision.device) for dtype in dtypes]
        for tensor in self._own:
            for (_, own), part in zip(frozen, tensor.split(channels, dim=1), strict=True):
                own[tensor.dtype] = part

    def __call__(self) -> None:
        """Fold and freeze."""
        self._scales.follow()
        for centre in self.centred:
            centre()
        for tensor in self._own:
            tensor.copy_(self._scales_of_frozen)
        # All that is small comes first: after each large weight the cache is empty.
        for writing in [fold.prepare(scale, shift, self._room) for fold, (scale, shift) in self._folds]:
            writing()


def outputs_of(layer: nn.Module) -> int:
    """How many outputs the weight of a layer has, whatever its attributes say, which pruning may leave as they were."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.shape[1] * layer.groups if isinstance(layer, _TRANSPOSED) else weight.shape[0]


def _along_outputs(layer: nn.Module, scale: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
    """A scale per output as it multiplies the weight of a layer, and how that one's first dimension is split for it."""
    dimensions: int = layer.weight.ndim  # type: ignore[assignment]
    if not isinstance(layer, _TRANSPOSED):
        return scale.view(-1, *(1,) * (dimensions - 1)), None
    # Outputs are those of one group; groups follow each other along the inputs.
    return scale.view(layer.groups, 1, -1, *(1,) * (dimensions - 2)), (layer.groups, -1)
