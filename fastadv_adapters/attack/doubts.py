"""What is allowed and seldom meant: notes that stand beside a number."""

import math

from torch import Tensor

from .balls import Norm

NONE_RIGHT = "no sample is right even without an attack: check labels, weights and what the model normalises"

SUM = 1e-2
"""By how much the sum of probabilities in half precision may differ from 1."""


def doubt_budget(eps: float, norm: Norm, bounds: tuple[float, float], coordinates: int) -> str | None:
    """A note if any image is within the budget of any other, as with 8 in the place of 8/255.

    Args:
        eps: the budget.
        norm: of the budget.
        bounds: the least and the largest value of an image.
        coordinates: how many values an image has.
    """
    lower, upper = bounds
    across = (upper - lower) * {"linf": 1.0, "l2": math.sqrt(coordinates), "l1": float(coordinates)}[norm]
    if eps < across:
        return None
    return (
        f"eps {eps:g} turns any image within {lower:g},{upper:g} into any other: eps is in units of the images (8/255, "
        f"not 8, if they end at 1)"
    )


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
