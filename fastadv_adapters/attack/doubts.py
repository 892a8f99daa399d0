"""What is allowed and seldom meant: notes that stand beside a number."""

import math

import torch
from torch import Tensor

from .balls import Norm

NONE_RIGHT = "no sample is right even without an attack: check labels, weights and what the model normalises"

LOADED = "were the weights loaded"

STEP = 0.1 / 255
"""A tenth of what two neighbouring bytes are apart, as a share of the bounds."""

SHORT = 0.1
"""Steps that all together go no further than this share of eps are hardly meant."""

SPAN = 0.1
"""Images that take up no more than this share of the bounds are hardly meant."""

APART = 1e-4
"""By how much, relative to the largest logit, two passes of a model differ if it draws random numbers. (The checks of
AutoAttack have the same number, absolute.)"""

NEAR = 0.2
"""By so much more than chance an accuracy is not chance any more."""

SUM = 1e-2
"""By how much the sum of probabilities in half precision may differ from 1."""

_Z = 1.959963984540054  # of the normal distribution, two-sided, 95 %


def doubt_budget(eps: float, norm: Norm, bounds: tuple[float, float], coordinates: int) -> str | None:
    """A note if any image is within the budget of any other, as with 8 in the place of 8/255, or none is.

    There is none if bounds have no end: they tell no units.

    Args:
        eps: the budget.
        norm: of the budget.
        bounds: the least and the largest value of an image.
        coordinates: how many values an image has.
    """
    lower, upper = bounds
    if not math.isfinite(upper - lower):
        return None
    across = (upper - lower) * {"linf": 1.0, "l2": math.sqrt(coordinates), "l1": float(coordinates)}[norm]
    if eps >= across:
        return (
            f"eps {eps:g} turns any image within {lower:g},{upper:g} into any other: eps is in units of the images "
            f"(8/255, not 8, if they end at 1)"
        )
    if norm == "linf" and 0 < eps < across * STEP:
        return (
            f"eps {eps:g} is less than a tenth of the step from one byte to the next in images within "
            f"{lower:g},{upper:g}: eps is in units of the images (8, not 8/255, if they end at 255)"
        )
    return None


def doubt_steps(eps: float, alpha: float | None, steps: int) -> str | None:
    """A note if steps of one size go next to nowhere, as with 2/255 in the place of 2, or 0."""
    if alpha is None or steps == 0 or alpha * steps >= eps * SHORT:
        return None
    return (
        f"steps of alpha {alpha:g}, all {steps} together, go less than a tenth of eps {eps:g}: alpha is in units of "
        f"the images, as eps is"
    )


def doubt_images(x: Tensor, bounds: tuple[float, float]) -> str | None:
    """A note if images (N, ...) take up next to nothing of the bounds, as those that end at 1 within 0 and 255."""
    least, largest, (lower, upper) = float(x.detach().amin()), float(x.detach().amax()), bounds
    if not math.isfinite(upper - lower) or not 0 < largest - least < SPAN * (upper - lower):
        return None
    return (
        f"values of images lie within {least:.4g},{largest:.4g}, and bounds are {lower:g},{upper:g}: eps and bounds "
        f"are in units of the images"
    )


def doubt_accuracy(right: int, count: int, classes: int) -> str | None:
    """A note if so many right samples are what guessing finds, as with weights that were not loaded.

    There is one if the 95 % interval of the accuracy reaches down to chance, and samples are enough for it to end near
    there. (With few samples it is wide, and says nothing.)

    Args:
        right: samples that are classified as labelled. If it is none, :data:`NONE_RIGHT` says more.
        count: all samples, at least 1.
        classes: how many there are.
    """
    least, most = wilson(right, count)
    if not right or not least <= 1 / classes or most >= 1 / classes + NEAR:
        return None
    return (
        f"clean accuracy {100 * right / count:.1f} % is no better than chance for {classes} classes: {LOADED}, and do "
        f"labels belong to them?"
    )


def doubt_classes(lost: int) -> str | None:
    """A note if so many samples have no class by the plain model."""
    if not lost:
        return None
    return f"logits of {lost} {'sample' if lost == 1 else 'samples'} are NaN or infinite: these count as wrong"


def doubt_logits(logits: Tensor) -> str | None:
    """A note if logits (N, C) look like probabilities."""
    if not len(logits) or not bool(((logits >= 0) & (logits <= 1)).all()):
        return None
    if not bool(((logits.double().sum(1) - 1).abs() <= SUM).all()):
        return None
    return (
        "the model seems to return probabilities: attacks expect logits, and behind a softmax their gradients vanish, "
        "so more samples stand than should. Return logits"
    )


def doubt_mode(logits: Tensor, changed: Tensor) -> str | None:
    """A note if logits (N, C) of a model in training mode are others once its own ``eval()`` was called on a copy."""
    if not is_random(logits, changed):
        return None
    return (
        "the model is in training mode, and its own eval() writes into its weights, or makes other layers, which is "
        "left out here: call eval() on the model first"
    )


def is_random(first: Tensor, second: Tensor) -> bool:
    """Whether logits (N, C) of two passes are of a model that draws random numbers."""
    peak = first.where(first.isfinite(), 0).abs().amax(1, keepdim=True).clamp_min(torch.finfo(first.dtype).tiny)
    apart = (first - second).abs().nan_to_num(nan=0.0, posinf=torch.inf)  # a class may be left out, by -inf, in both
    return bool((apart / peak > APART).any())


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953."""
    share, square = successes / count, _Z**2 / count
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / count / 4)
    return (middle - half if successes else 0.0), (middle + half if successes < count else 1.0)
