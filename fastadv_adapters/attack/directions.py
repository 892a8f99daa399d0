"""Directions at the logits that steps follow, written down instead of found by autograd."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Ascent = Callable[[Tensor, Tensor, float | Tensor], tuple[Tensor, Tensor]]
"""Logits (N, C), labels (N,) and the share of the steps that is done, 0 to 1, for all or per sample (N, 1), to the
values of a loss (N,) and the direction at the logits (N, C) that raises it."""

SHARPNESS = (3.0, 9.0)
"""How many times the gap the exponents of "auto" are, at the first step and at the last one."""


def sharpness(progress: float | Tensor) -> float | Tensor:
    """The factor at a share of the steps, 0 to 1: it rises by equal ratios.

    First the steps push several classes and choose among them, at last they push the nearest one alone.
    """
    first, last = SHARPNESS
    factor: float | Tensor = first * (last / first) ** progress
    return factor


def cross_entropy_ascent(logits: Tensor, labels: Tensor, progress: float | Tensor) -> tuple[Tensor, Tensor]:
    """The safe cross entropy and its gradient, see ``losses.cross_entropy``."""
    check_classes(logits, 2, "ce")
    rivals = others(logits, labels)
    values = rivals.logsumexp(1) - own(logits, labels)
    return values, rivals.softmax(1).scatter_(1, labels[:, None], -1.0)


def margin_ascent(logits: Tensor, labels: Tensor, progress: float | Tensor) -> tuple[Tensor, Tensor]:
    """The margin and its gradient, which is shared by others that are equally large, as autograd has it."""
    check_classes(logits, 2, "margin")
    rivals = others(logits, labels)
    largest = rivals.amax(1, keepdim=True)
    share = (rivals == largest).to(logits.dtype)
    share.div_(share.sum(1, keepdim=True)).scatter_(1, labels[:, None], -1.0)
    return largest.squeeze(1) - own(logits, labels), share


def auto_ascent(logits: Tensor, labels: Tensor, progress: float | Tensor) -> tuple[Tensor, Tensor]:
    """The margin, and a direction that does not change if all logits of a sample are scaled or shifted.

    It is -1 at the label, and at the others the softmax of ``sharpness * z / gap``, with the gap between the largest
    and the third largest logit of the sample (of two classes between both). Finite for all logits: equal ones share,
    and so do infinite ones; a sample with NaN among its logits has some direction.
    """
    check_classes(logits, 2, "auto")
    largest = others(logits, labels).amax(1, keepdim=True)
    top = logits.topk(min(3, logits.shape[1]), 1).values
    gap = (top[:, :1] - top[:, -1:]).clamp_(torch.finfo(logits.dtype).tiny, 1 / torch.finfo(logits.dtype).tiny)
    # Shifted before it is divided: after that a tie would not be one. The largest are at 0, infinite ones too.
    below = (logits - largest).div_(gap).mul_(sharpness(progress)).nan_to_num_(0.0, 0.0, -torch.inf)
    direction = below.scatter_(1, labels[:, None], -torch.inf).softmax(1).scatter_(1, labels[:, None], -1.0)
    return largest.squeeze(1) - own(logits, labels), direction


@dataclass(frozen=True)
class Reversed:
    """The way down; an object and no function inside another, so that attacks can be pickled."""

    ascent: Ascent

    def __call__(self, logits: Tensor, targets: Tensor, progress: float | Tensor) -> tuple[Tensor, Tensor]:
        """The negative values, and the opposite direction."""
        values, direction = self.ascent(logits, targets, progress)
        return values.neg_(), direction.neg_()


def own(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits of the labels, (N,)."""
    return logits.gather(1, labels[:, None]).squeeze(1)


def others(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits with minus infinity at the label."""
    return logits.scatter(1, labels[:, None], -torch.inf)


def check_classes(logits: Tensor, least: int, name: str) -> None:
    """A loss needs some classes to compare."""
    if logits.ndim != 2 or logits.shape[1] < least:
        raise ValueError(
            f"expected logits of shape (N, C) with C of at least {least} for the loss {name}, got shape "
            f"{tuple(logits.shape)}. Attack a model that gives one logit per class, or pass another loss"
        )
