"""The projection onto the L1 ball within bounds, along the cut by which every coordinate shrinks."""

import torch
from torch import Tensor

from ..modules import widest_on


def shrink(size: Tensor, room: Tensor, radius: float) -> Tensor:
    """``clamp(size - cut, 0, room)`` with the least ``cut >= 0``, per row, where a row adds up to at most ``radius``.

    The sum is piecewise linear in the cut: as that falls, a coordinate starts to grow at ``size`` and is full at
    ``size - room``. Going through these points in order finds the segment, and the cut within it.
    """
    count = size.shape[1]
    points, order = torch.cat([size, (size - room).clamp_min_(0)], 1).sort(1, descending=True)
    points = points.to(widest_on(size.device))
    growing = torch.where(order < count, 1, -1).cumsum(1)[:, :-1]
    total = ((points[:, :-1] - points[:, 1:]) * growing).cumsum(1)
    segment = (total <= radius).sum(1, keepdim=True)
    inside = segment < total.shape[1]
    segment = segment.clamp_max_(total.shape[1] - 1)
    excess = (total.gather(1, segment) - radius) / growing.gather(1, segment).clamp_min_(1)
    cut = torch.where(inside, points.gather(1, segment + 1) + excess, 0.0).to(size.dtype)
    return (size - cut).clamp_min_(0).minimum(room)
