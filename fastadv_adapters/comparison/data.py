"""The batch of a comparison: what cannot be attacked is refused, and what is seldom meant is noted."""

import torch
from torch import Tensor, nn

from ..attack import (
    NONE_RIGHT,
    accept_classifier,
    accept_inputs,
    accept_logits,
    doubt_accuracy,
    doubt_budget,
    doubt_classes,
    doubt_images,
    doubt_logits,
    doubt_mode,
    is_random,
    undecided,
)
from .budgets import Budget
from .leaving import plain

RANDOM = (
    "the model draws random numbers: gradients and verdicts change from pass to pass, of the plain model too; evaluate "
    "takes the majority of several passes"
)


def accept_data(
    model: nn.Module, x: Tensor, y: Tensor | None, budget: Budget, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The labels (N,), and the model's logits (N, C)."""
    given = torch.zeros(getattr(x, "shape", ())[:1], dtype=torch.int64, device=device) if y is None else y
    largest = accept_inputs(x, given, device, budget.bounds)
    if not len(x):
        raise ValueError("expected at least one sample, got none: pass a batch to be attacked")
    with torch.no_grad():
        logits = accept_logits(accept_classifier(model, x), len(x), largest)
    return (logits.argmax(1) if y is None else plain(y).to(torch.int64)), logits


@torch.no_grad()
def doubts(
    model: nn.Module, x: Tensor, y: Tensor, logits: Tensor, budget: Budget, switched: nn.Module | None
) -> list[str]:
    """Notes on what is seldom meant; ``switched`` is the model after its own ``eval()``, if that is another one."""
    random = is_random(logits, model(x.clone()))
    right = int(are_right(logits, y).sum())
    wide = doubt_budget(budget.eps, budget.norm, budget.bounds, x[0].numel())
    notes = [
        wide if budget.stated else None,
        doubt_accuracy(right, len(x), logits.shape[1]) if right else NONE_RIGHT,
        doubt_classes(int(undecided(logits).sum())),
        doubt_images(x, budget.bounds),
        doubt_logits(logits),
        RANDOM if random else None,
        None if random or switched is None else doubt_mode(logits, switched(x.clone())),
    ]
    return [note for note in notes if note is not None]


def are_right(logits: Tensor, y: Tensor) -> Tensor:
    """Which samples are classified as labelled, bool (N,); one without a class is not."""
    return (logits.argmax(1) == y) & ~undecided(logits)
