"""Rounding of perturbed samples toward the samples they came from, so that no budget is exceeded by rounding."""

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(values: Tensor) -> Tensor:
    """A view of floating values as integers with the same bits."""
    return values.view(_BITS[values.element_size()])


def toward(origin: Tensor, delta: Tensor) -> Tensor:
    """``origin + delta`` in the origin's dtype, rounded so that no coordinate is further from it than ``delta`` says.

    Args:
        origin: any floating dtype.
        delta: in float64, in which distances are measured; or in float32, where the device has no other, and then a
            coordinate may end up to two floats nearer than it could.
    """
    wide = origin.to(delta.dtype)
    target = (wide + delta).to(origin.dtype)
    over = (target.to(wide.dtype) - wide).abs() > delta.abs()
    if wide.dtype != torch.float64:
        over = target != origin  # a float32 difference is itself rounded: always one step less
    # Floats of one sign are ordered as the integers with their bits are (``nextafter`` lacks half precision on some
    # devices). A zero needs the origin's sign, so that the next float on that side is one more.
    signed = torch.where(target == 0, torch.where(origin < 0, -0.0, 0.0).to(target.dtype), target)
    bits = bits_of(signed)
    away_from_zero = (target < origin) == (bits >= 0)
    return torch.where(over, torch.where(away_from_zero, bits + 1, bits - 1).view(origin.dtype), target)
