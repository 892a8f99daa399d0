"""Convolutions of images with 3 channels, run on 4 or 8 of which the others are zero: as tensor cores take them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import Precision, become, kind_of
from .prepared import SWITCHES

_CHANNELS = 3


class _Padded:
    """Mixin for a convolution.

    Attributes:
        wide: its weight with zeros behind it.
        own: its weight, which is a view of that: whatever follows the model writes here.
    """

    wide: Tensor
    own: Tensor

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight is self.own and input.ndim == weight.ndim:
            missing = self.wide.shape[1] - _CHANNELS
            padding = (0,) * (2 * weight.ndim - 3) + (missing,)
            input, weight = F.pad(input.to(weight.dtype), padding), self.wide
        output: Tensor = super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        return output


def pad_first(part: nn.Module, precision: Precision) -> None:
    """Have a convolution with its own frozen weight run on more channels, if that is switched on."""
    channels = SWITCHES.on(precision.device).first_channels
    if not channels or not isinstance(part, nn.Conv2d) or kind_of(part) is not nn.Conv2d:
        return
    own = part.weight
    if part.groups != 1 or own.shape[1] != _CHANNELS:
        return
    form = precision.memory_format(own.ndim)
    wide = torch.zeros(len(own), channels, *own.shape[2:], dtype=own.dtype, device=own.device)
    wide = wide.contiguous(memory_format=form)
    own.data = wide[:, :_CHANNELS]
    become(part, _Padded)
    vars(part).update(wide=wide, own=own)
