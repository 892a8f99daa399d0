"""Winograd's minimal filtering of a kernel of three along one dimension: the transforms, by stride and size of tile.

In the notation of Lavin and Gray (2016, https://arxiv.org/abs/1509.09308) a tile of outputs is  A'[(G g) * (B' d)].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Transform = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
"""From some tensors to others, which are written to; what is read may be overwritten."""


@dataclass(frozen=True)
class Filter:
    """An algorithm along one dimension.

    Attributes:
        window: entries that a tile reads.
        step: entries from one tile to the next.
        outputs: entries that a tile gives.
        matrix: G, a row of three for each product.
        spread: B', from the entries of a window to factors of the products.
        sum: A', from the products to the outputs.
    """

    window: int
    step: int
    outputs: int
    matrix: Sequence[Sequence[float]]
    spread: Transform
    sum: Transform

    @property
    def products(self) -> int:
        """How many products there are."""
        return len(self.matrix)

    def reach(self, tiles: int) -> int:
        """Entries that so many tiles read."""
        return self.step * (tiles - 1) + self.window


# Four outputs: points 0, A, -A, B, -B and infinity. Of the pairs of sixteenths that were tried these are among those
# that round least, and all constants of the transforms are exact in float32.
A, B = 5 / 8, 3 / 2
_AA, _BB = A * A, B * B


def _row(point: float, others: float) -> list[float]:
    return [power / (2 * point * point * (point * point - others)) for power in (1.0, point, point * point)]


_FOUR = [[1 / (_AA * _BB), 0.0, 0.0], _row(A, _BB), _row(-A, _BB), _row(B, _AA), _row(-B, _AA), [0.0, 0.0, 1.0]]


def _spread_four(d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    for point, other, plus, minus in ((A, _BB, 1, 2), (B, _AA, 3, 4)):
        torch.sub(d[3], d[1], alpha=other, out=out[0])
        torch.sub(d[4], d[2], alpha=other, out=out[plus])
        torch.sub(out[plus], out[0], alpha=point, out=out[minus])
        out[plus].add_(out[0], alpha=point)
    torch.add(d[4], d[0], alpha=_AA * _BB, out=out[0]).sub_(d[2], alpha=_AA + _BB)
    torch.add(d[5], d[1], alpha=_AA * _BB, out=out[5]).sub_(d[3], alpha=_AA + _BB)


def _sum_four(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    torch.add(m[1], m[2], out=out[0])
    torch.add(m[3], m[4], out=out[2])
    odd, other_odd = m[1].sub_(m[2]), m[3].sub_(m[4])
    torch.mul(odd, A, out=out[1]).add_(other_odd, alpha=B)
    torch.add(m[5], odd, alpha=A * _AA, out=out[3]).add_(other_odd, alpha=B * _BB)
    torch.mul(out[0], _AA, out=m[2]).add_(out[2], alpha=_BB)
    out[0].add_(out[2]).add_(m[0])
    out[2].copy_(m[2])


def _spread_two(d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _sum_two(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


def _spread_halve(d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    torch.sub(d[0], d[2], out=out[0])
    out[1].copy_(d[2])
    torch.sub(d[4], d[2], out=out[2])
    out[3].copy_(d[1])
    out[4].copy_(d[3])


def _sum_halve(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    torch.add(m[0], m[1], out=out[0]).add_(m[3])
    torch.add(m[1], m[2], out=out[1]).add_(m[4])


def _spread_double(d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    torch.sub(d[0], d[1], out=out[0])
    out[1].copy_(d[1])
    torch.sub(d[2], d[1], out=out[2])
    out[3].copy_(d[0])
    out[4].copy_(d[1])


def _sum_double(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    out[0].copy_(m[3])
    torch.add(m[0], m[1], out=out[1])
    out[2].copy_(m[4])
    torch.add(m[1], m[2], out=out[3])


FOUR = Filter(6, 4, 4, _FOUR, _spread_four, _sum_four)
"""Four outputs, stride 1."""

TWO = Filter(4, 2, 2, [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], _spread_two, _sum_two)
"""Two outputs, stride 1; points 0, 1, -1 and infinity."""

HALVE = Filter(5, 4, 2, [[1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 1, 0], [0, 1, 0]], _spread_halve, _sum_halve)
"""Two outputs, stride 2: the outer weights over the entries at even places, points 0, 1 and infinity, and the middle
one over those between."""

DOUBLE = Filter(3, 2, 4, [[0, 0, 1], [1, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]], _spread_double, _sum_double)
"""The gradient of that with one entry of padding: from every second tile of gradients, four at the input."""
