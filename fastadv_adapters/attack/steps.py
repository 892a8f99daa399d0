"""How long the steps of ``SafePGD`` are, and how many rows a batch has that the network sees."""

from .balls import Norm

FIRST: dict[Norm, float] = {"linf": 2.0, "l2": 2.0, "l1": 1.0}
"""The first of the default steps, as a multiple of eps, by norm."""

WIDER = 1.5
"""By how many eps the ball of the first default step in L1 is wider."""

ENOUGH = 6
"""Fewer steps than this have none to spare for a larger ball."""

LEAST_ROWS = 8
"""The smallest batch that is filled up to: halving goes on until here, since every shape is compiled or recorded."""


def step_sizes(norm: Norm, *, eps: float, steps: int, alpha: float | None) -> tuple[float, ...]:
    """The size of each step in the ball of radius eps, in units of the inputs and of the norm.

    (``SafePGD`` in L1 takes longer steps in the larger ball that it begins with, see its ``alpha``; that factor is not
    in here.)

    Args:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        eps: the budget.
        steps: how many there are.
        alpha: the size of all; None for sizes that get smaller in a straight line, from ``2 * eps`` (``eps`` for
            ``"l1"``) at the first step towards 0 after the last. The first steps, as long as those of APGD (Croce and
            Hein 2020, arXiv:2003.01690, and 2021, arXiv:2103.01208), go anywhere in the ball; the last ones settle.
    """
    if alpha is not None:
        return (alpha,) * steps
    return tuple(FIRST[norm] * eps * (1 - step / steps) for step in range(steps))


def radii(norm: Norm, *, steps: int, alpha: float | None) -> tuple[float, ...]:
    """The radius of the ball at each step, as a multiple of eps: 1 but for the default steps in L1.

    There an iterate near the sphere can hardly move: what one coordinate gains another one loses. So the first steps
    walk in a larger ball, which shrinks to eps over the first half of them (Croce and Hein 2021, arXiv:2103.01208,
    section 3.2, where it shrinks twice). A step there is :func:`step_sizes`' times the same factor.
    """
    if norm != "l1" or alpha is not None or steps < ENOUGH:
        return (1.0,) * steps
    shrinking = steps // 2
    return tuple(max(1.0, 1.0 + WIDER * (1 - step / shrinking)) for step in range(steps))


def rows_for(samples: int, most: int) -> int:
    """How many rows a batch has that holds ``samples`` where every new shape costs: a power of two, or ``most``.

    As samples are dropped from a batch of ``most``, its size is halved again and again: there are at most
    ``log2(most) + 1`` sizes. Powers of two are the same for every ``most``, so batches of different sizes share them;
    and they are multiples of 8, which suits tensor cores.
    """
    return min(most, max(LEAST_ROWS, 1 << (samples - 1).bit_length()))
