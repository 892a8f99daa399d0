"""Balls around a batch in the L-infinity, L2 and L1 norm: random start, step of steepest ascent, projection.

Nothing here waits for the device. A half-precision batch is iterated in float32, so that steps below the resolution of
its dtype add up. Where a device has no float64 (Apple's mps) rounding is conservative: a little of eps stays unused.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from ..modules import has_float64, widest_on
from .rounding import toward
from .shrinking import shrink

if TYPE_CHECKING:
    from typing_extensions import Self

Norm = Literal["linf", "l2", "l1"]
"""How a perturbation is measured: ``"linf"`` by its largest absolute value, ``"l2"`` by its Euclidean length, ``"l1"``
by the sum of its absolute values."""

_L1_SHARE = 0.25  # of the range between the bounds, by which one L1 step moves a coordinate at most
_LARGEST_RADIUS = 1e30  # keeps sums of a few of them finite in float32
_LEAST_SQUARED = 1e-12  # a length whose square is far inside float32's range, also a million times longer or shorter
_SLACK = 1e-5  # relative, of a norm that was measured in float32


def accept_norm(norm: object) -> Norm:
    """The norm's name if there is one of that name; raises ValueError otherwise."""
    for known in _BALLS:
        if norm == known:
            return known
    raise ValueError(f"expected norm to be one of {', '.join(map(repr, _BALLS))}, got {norm!r}. Choose one of them")


def ball_around(norm: Norm, x: Tensor, *, eps: float, bounds: tuple[float, float] = (0.0, 1.0)) -> "Ball":
    """The :class:`Ball` of radius ``eps`` around each sample of ``x``, cut to ``bounds``.

    Args:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        x: shape (N, ...), floating, inside ``bounds``. Not copied and not changed.
        eps: radius in units of ``x``, as :func:`~fastadv_adapters.attack.accept_size` returns it: not checked here.
        bounds: least and largest value of any coordinate, likewise (``accept_bounds``); rounded to ``x``'s dtype.

    Raises:
        ValueError: unknown norm.
    """
    lower, upper = (torch.tensor(b, dtype=x.dtype, device="cpu").item() for b in bounds)
    return _BALLS[accept_norm(norm)].around(x.detach(), eps, lower, upper)


@dataclass(frozen=True, eq=False)
class Ball(ABC):
    """What perturbations of each sample are allowed: within ``eps`` of ``origin`` in a norm, and within bounds.

    Iterates have the dtype :attr:`working`; methods that end in an underscore write into the iterate they are given.

    Attributes:
        origin: the unperturbed samples, shape (N, ...).
        eps: radius.
        lower: least value of a coordinate.
        upper: largest value of a coordinate.
    """

    order: ClassVar[float]

    origin: Tensor
    eps: float
    lower: float
    upper: float

    @classmethod
    def around(cls, origin: Tensor, eps: float, lower: float, upper: float) -> "Self":
        """The ball with these attributes, and what can be computed once for all steps."""
        return cls(origin, eps, lower, upper)

    @property
    def working(self) -> torch.dtype:
        """The dtype of iterates, that of ``origin``, or float32 if ``origin`` is in half precision."""
        return torch.promote_types(self.origin.dtype, torch.float32)

    @property
    def radius(self) -> float:
        """``eps``, but 0 if it is below the working dtype's normal range, and no larger than the bounds allow."""
        largest = min(self._coordinates * (self.upper - self.lower), _LARGEST_RADIUS)
        return min(self.eps, largest) if self.eps >= torch.finfo(self.working).tiny else 0.0

    @property
    def _coordinates(self) -> int:
        return math.prod(self.origin.shape[1:])

    def start(self) -> Tensor:
        """An iterate at the origin."""
        return self.origin.to(self.working, copy=True)

    def take(self, index: Tensor) -> "Self":
        """The ball of the samples at ``index``, an int64 tensor on the origin's device."""
        taken: dict[str, Any] = {k: v.index_select(0, index) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **taken)

    def join(self, other: "Self") -> "Self":
        """The ball of these samples and then of others, with the same budget and bounds."""
        mine, theirs = vars(self), vars(other)
        joined: dict[str, Any] = {k: torch.cat([v, theirs[k]]) for k, v in mine.items() if isinstance(v, Tensor)}
        return replace(self, **joined)

    def times(self, factor: float) -> "Self":
        """The ball around the same samples with ``factor`` times the radius."""
        return self if factor == 1 else type(self).around(self.origin, factor * self.eps, self.lower, self.upper)

    def step_(self, x: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
        """Move ``x`` by ``alpha`` along the gradient, project it back into ball and bounds, and return it.

        In L-infinity a step follows the sign (Madry et al. 2018, arXiv:1706.06083), in L2 the gradient divided by its
        length. In L1 it spends ``alpha`` on the coordinates with the largest gradient, after SLIDE (Tramer and Boneh
        2019, arXiv:1904.13000), and the projection is that of Croce and Hein 2021, arXiv:2103.01208.

        Args:
            x: iterates (N, ...), of dtype :attr:`working`; written into.
            gradient: of the loss at ``x``, (N, ...); 2^-100 is as good as 1. A sample whose gradient is all zero stays.
            alpha: one number, or one per sample, (N, 1, ...).
        """
        # Anything longer than this ends in the same place; without a limit a huge alpha would overflow.
        most = 1e6 * self.radius
        size = alpha.to(self.working).clamp(max=most) if isinstance(alpha, Tensor) else min(alpha, most)
        self._move_(x, gradient.to(self.working), size)
        return self.project_(x)

    def finish(self, x: Tensor) -> Tensor:
        """A copy of ``x`` in the origin's dtype, rounded toward the origin, within ``eps`` as measured in float64."""
        exact, wide = has_float64(x.device), widest_on(x.device)
        delta = x.to(wide) - self.origin.to(wide)
        length, eps = self._length(delta), self.eps if exact else self.eps * (1 - _SLACK)
        found = toward(self.origin, delta * torch.where(length > eps, eps / length, 1.0))
        # A delta is a rounded difference: the sum may lie one value past a bound that x was at.
        return found.clamp_(self.lower, self.upper)

    @abstractmethod
    def random_start(self, generator: Generator | None = None) -> Tensor:
        """An iterate drawn uniformly from the ball, cut to the bounds; drawn on the generator's device."""

    @abstractmethod
    def project_(self, x: Tensor) -> Tensor:
        """Bring ``x`` back into the ball and the bounds, up to rounding."""

    @abstractmethod
    def _move_(self, x: Tensor, gradient: Tensor, alpha: float | Tensor) -> None: ...

    def _length(self, delta: Tensor) -> Tensor:
        return _norm(delta, self.order)

    def _draw(self, fill: Callable[[Tensor], Tensor], generator: Generator | None, *shape: int) -> Tensor:
        """A tensor of the origin's shape, or (N, *shape), filled on the generator's device."""
        device = self.origin.device if generator is None else generator.device
        size = (len(self.origin), *shape) if shape else self.origin.shape
        return fill(torch.empty(size, dtype=self.working, device=device)).to(self.origin.device)


@dataclass(frozen=True, eq=False)
class LinfBall(Ball):
    """No coordinate moves by more than ``eps``: exactly, measured in float64, in the origin's own dtype.

    ``low`` and ``high``, the last representable values inside the budget and the bounds, are found once per attack.
    """

    order = math.inf

    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, origin: Tensor, eps: float, lower: float, upper: float) -> "Self":
        """The ball with these attributes; finds the limits."""
        exact = has_float64(origin.device)
        wide, most = (torch.float64, eps) if exact else (torch.float32, eps * (1 - _SLACK))
        delta = torch.full((), most, dtype=wide, device=origin.device)
        ends = (toward(origin, d).clamp_(lower, upper) for d in (-delta, delta))
        low, high = (end.to(torch.promote_types(origin.dtype, torch.float32)) for end in ends)
        return cls(origin, eps, lower, upper, low, high)

    def random_start(self, generator: Generator | None = None) -> Tensor:
        """An iterate drawn uniformly from the ball within the bounds."""
        share = self._draw(lambda t: t.uniform_(generator=generator), generator)
        return self.project_(torch.lerp(self.low, self.high, share))

    def project_(self, x: Tensor) -> Tensor:
        """Clamp every coordinate."""
        return x.clamp_(self.low, self.high)

    def finish(self, x: Tensor) -> Tensor:
        """A copy of ``x`` in the origin's dtype: rounding to it cannot leave limits that are representable in it."""
        return x.to(self.origin.dtype, copy=True)

    def _move_(self, x: Tensor, gradient: Tensor, alpha: float | Tensor) -> None:
        _along_(x, gradient.sign(), alpha)


@dataclass(frozen=True, eq=False)
class L2Ball(Ball):
    """The Euclidean length of a perturbation is at most ``eps``; a step follows the gradient divided by its length."""

    order = 2

    def random_start(self, generator: Generator | None = None) -> Tensor:
        """An iterate drawn uniformly from the ball, then clamped to the bounds."""
        direction = self._unit(self._draw(lambda t: t.normal_(generator=generator), generator))
        ones = (1,) * (self.origin.ndim - 1)
        share = self._draw(lambda t: t.uniform_(generator=generator), generator, *ones)
        length = self.radius * share ** (1 / self._coordinates)
        return direction.mul_(length).add_(self.origin).clamp_(self.lower, self.upper)

    def project_(self, x: Tensor) -> Tensor:
        """Scale perturbations that are too long, then clamp to the bounds, which only shortens them."""
        if self.radius == 0:
            return x.copy_(self.origin)
        delta = x.sub_(self.origin)
        delta.div_(self._share(delta).clamp_min_(1.0))
        return x.add_(self.origin).clamp_(self.lower, self.upper)

    def _share(self, delta: Tensor) -> Tensor:
        """The length of each perturbation as a multiple of the radius; a copy only where squares leave float32."""
        if _LEAST_SQUARED < self.radius < 1 / _LEAST_SQUARED:
            return self._length(delta).div_(self.radius)
        return self._length(delta / self.radius)

    def _move_(self, x: Tensor, gradient: Tensor, alpha: float | Tensor) -> None:
        # What the clamp would take back is left out of the direction, so that alpha goes where it has an effect.
        blocked = torch.where(gradient > 0, x >= self.upper, x <= self.lower)
        _along_(x, self._unit(gradient.masked_fill(blocked, 0)), alpha)

    def _unit(self, v: Tensor) -> Tensor:
        """Each sample divided by its length, which is measured after scaling, since squares of 2^-100 underflow."""
        tiny = torch.finfo(v.dtype).tiny  # for what is all zero, which stays so
        scaled = v / _norm(v, math.inf).clamp_min_(tiny)
        return scaled.div_(self._length(scaled).clamp_min_(tiny))


@dataclass(frozen=True, eq=False)
class L1Ball(Ball):
    """The absolute values of a perturbation add up to at most ``eps``.

    A step passes over coordinates at the bound that they would cross. SLIDE moves a fixed share of the others; here
    each is moved to its bound, but by at most a quarter of the range, until ``alpha`` is spent, so that their number
    follows from eps: stronger than any fixed share on digits of 64 and 3072 coordinates. The projection is exact.
    """

    order = 1

    def random_start(self, generator: Generator | None = None) -> Tensor:
        """An iterate drawn uniformly from the ball, then clamped to the bounds."""
        # Shares of exponential variables are uniform on the simplex; the share of one more is the distance to it.
        shares = self._draw(lambda t: t.exponential_(generator=generator), generator, self._coordinates + 1)
        signs = self._draw(lambda t: t.bernoulli_(0.5, generator=generator), generator).mul_(2).sub_(1)
        shares = shares.div_(_nonzero(shares.sum(1, keepdim=True)))[:, :-1].reshape(self.origin.shape)
        return signs.mul_(shares).mul_(self.radius).add_(self.origin).clamp_(self.lower, self.upper)

    def project_(self, x: Tensor) -> Tensor:
        """The nearest point of the ball within the bounds."""
        delta = x - self.origin
        room = torch.where(delta > 0, self.upper - self.origin, self.origin - self.lower)
        size = shrink(delta.abs().flatten(1), room.flatten(1), self.radius).view(delta.shape)
        torch.add(self.origin, delta.sign_().mul_(size), out=x)
        return x.clamp_(self.lower, self.upper)

    def _move_(self, x: Tensor, gradient: Tensor, alpha: float | Tensor) -> None:
        alpha = alpha if isinstance(alpha, Tensor) else x.new_full((), alpha)
        alpha = alpha.reshape(-1, 1)
        room = torch.where(gradient > 0, self.upper - x, x - self.lower).masked_fill_(gradient == 0, 0).flatten(1)
        most = alpha.clamp(max=_L1_SHARE * (self.upper - self.lower))
        order = gradient.abs().flatten(1).masked_fill_(room <= 0, 0).argsort(1, descending=True)
        amount = room.clamp_(min=0).minimum(most).gather(1, order)
        spent = amount.cumsum(1) - amount
        amount = amount.minimum((alpha - spent).clamp_min_(0))
        x.addcmul_(gradient.sign(), torch.zeros_like(room).scatter_(1, order, amount).view(x.shape))


_BALLS: dict[Norm, type[Ball]] = {"linf": LinfBall, "l2": L2Ball, "l1": L1Ball}


def _norm(v: Tensor, order: float) -> Tensor:
    """The norm of each sample, shape (N, 1, ...)."""
    length: Tensor = torch.linalg.vector_norm(v, order, tuple(range(1, v.ndim)), keepdim=True)
    return length


def _along_(x: Tensor, direction: Tensor, alpha: float | Tensor) -> None:
    """Add ``alpha``, one for all or one per sample, times the direction."""
    if isinstance(alpha, Tensor):
        x.addcmul_(direction, alpha)
    else:
        x.add_(direction, alpha=alpha)


def _nonzero(v: Tensor) -> Tensor:
    return torch.where(v == 0, 1.0, v)
