"""Attacks that ask for one logit at a time (FAB, DeepFool) step along differences of what they get."""

from dataclasses import replace

import torch
from torch import Tensor

from .audit import Problem

ROUNDED = torch.finfo(torch.float32).eps / 2
"""A cross entropy of samples that are surer than this leaves one entry as well: at their label it rounds to zero."""


def differences_of(problem: Problem) -> tuple[Problem, Problem] | None:
    """The same samples, asked for another logit, and for the difference; None if no single logits were asked for.

    If all logits share a large part, its gradient hides that the rest of each is off. The difference of two gradients
    shows it.

    Args:
        problem: samples whose gradients have been asked for in full precision.
    """
    asked = [place for place, grad in enumerate(problem.grads) if grad is not None]
    if len(asked) != 1:
        return None
    (place,) = asked
    grad, values = problem.grads[place], problem.values[place]
    if grad is None or grad.ndim != 2 or grad.shape != values.shape or grad.shape[1] < 2:
        return None
    single = grad != 0
    if not _ask_for_single_logits(grad, single):
        return None
    other = values.masked_fill(single | ~values.isfinite(), -torch.inf).argmax(1, keepdim=True)
    moved = torch.zeros_like(grad).scatter(1, other, grad.sum(1, keepdim=True))

    def asking(wanted: Tensor) -> Problem:
        return replace(problem, grads=[wanted if at == place else None for at in range(len(problem.grads))])

    return asking(moved), asking(grad - moved)


def _ask_for_single_logits(grad: Tensor, single: Tensor) -> bool:
    """Whether these gradients (N, C) have one entry a sample at most, and not what rounding left of two."""
    sizes = grad[single].abs()
    return len(sizes) > 0 and bool((single.sum(1) <= 1).all()) and bool(sizes.amin() > ROUNDED)
