"""How a tensor of the fast network follows the wrapped model: in place, into storage that stays."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .copying import clone
from .precision import HALF

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


_AT_ONCE = 2**18
"""Entries that a processor casts at a time: as many as its cache holds."""

ScaleAndShift = dict[torch.dtype, Tensor]
"""A batch norm frozen: for each dtype that its input may have, (2, channels)."""


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

    def __call__(self) -> None:
        """Copy."""
        _write(self.ours[self.name], self.theirs[self.name])


@dataclass
class ReplaceTensor:
    """Follow a plain attribute, a stored activation or None: its shape may change, and the network may replace it."""

    theirs: dict[str, Any]
    ours: dict[str, Any]
    name: str
    dtype: torch.dtype | None
    own: Tensor | None = None

    def __call__(self) -> None:
        """Copy in place, or clone where another tensor is in that place (which somebody else may hold)."""
        theirs, own = self.theirs[self.name], self.own
        if theirs is not None and own is not None and self.ours[self.name] is own and theirs.shape == own.shape:
            own.copy_(theirs)
        else:
            self.ours[self.name] = self.own = None if theirs is None else clone(theirs.to(self.dtype))


@dataclass
class FollowLayer:
    """Follow a layer with the batch norm behind it."""

    layer: nn.Module
    norm: _BatchNorm
    weight: Tensor
    bias: Tensor

    def __call__(self) -> None:
        """Fold."""
        scale, shift = scale_and_shift(self.norm)
        weight, bias = self.layer.weight, self.layer.bias
        _write(self.weight, weight, _along_outputs(scale, self.layer))  # type: ignore[arg-type]
        if bias is not None:
            shift = torch.addcmul(shift, scale, bias)  # type: ignore[arg-type]
        self.bias.copy_(shift)


@dataclass
class FollowNorm:
    """Follow a batch norm frozen into a scale and a shift."""

    norm: _BatchNorm
    own: ScaleAndShift

    def __call__(self) -> None:
        """Fold."""
        scale, shift = scale_and_shift(self.norm)
        for own in self.own.values():
            own[0].copy_(scale)
            own[1].copy_(shift)


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The one scale and shift per channel that batch norm is in eval mode."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("expected a batch norm with running statistics, got one without")
    mean, var = (t.float() if t.dtype in HALF else t for t in (mean, var))
    scale = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale
    bias: Tensor | None = norm.bias
    return scale, shift if bias is None else shift + bias


def _write(out: Tensor, weight: Tensor, scale: Tensor | None = None) -> None:
    """``weight``, or ``weight * scale``, into ``out``, rounded once."""
    alike = out.stride() == weight.stride()
    if scale is None and alike:
        out.copy_(weight)
    elif out.device.type == "cpu" and out.dtype in HALF and out.dtype != weight.dtype and out.ndim > 2:
        # In parts that stay in the cache; and cast before layout, for PyTorch does both at once entry by entry.
        rows = max(1, len(weight) * _AT_ONCE // max(weight.numel(), 1))
        scales = [None] * len(weight) if scale is None else scale.split(rows)
        for part, by, into in zip(weight.split(rows), scales, out.split(rows), strict=False):
            product = part if by is None else part * by
            into.copy_(product if alike else product.to(out.dtype))
    elif scale is None:
        out.copy_(weight)
    else:
        torch.mul(weight, scale, out=out)


def _along_outputs(scale: Tensor, layer: nn.Module) -> Tensor:
    """The scale shaped so that it multiplies the outputs of ``layer.weight``."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if not isinstance(layer, _TRANSPOSED):
        return scale.view(-1, *(1,) * (weight.ndim - 1))
    inputs, outputs = weight.shape[:2]  # outputs of one group; groups follow each other along the inputs
    rows = scale.view(layer.groups, outputs).repeat_interleave(inputs // layer.groups, dim=0)
    return rows.view(inputs, outputs, *(1,) * (weight.ndim - 2))
