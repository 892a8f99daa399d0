"""What an attack wants of the outputs: another class, or just a higher loss.

The three classes have the same methods. Whatever these are given or return has a row per sample.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..boundary import Packed
from .checks import accept_logits
from .losses import Loss, margin
from .targets import Targets


@dataclass(frozen=True)
class AnotherClass:
    """Logits (N, C) shall have their largest at another class than the label, or with ``targeted`` at the label."""

    loss: Loss
    targeted: bool
    largest_label: int

    def accept(self, outputs: Any, samples: int) -> Packed:
        """The outputs for so many samples, packed; an error if they are no logits with a class for every label."""
        return Packed(accept_logits(outputs, samples, self.largest_label))

    def values(self, outputs: Packed, targets: Targets, samples: int) -> Tensor:
        """The loss, (N,)."""
        return self.loss(outputs.tensors[0], targets.tree)

    def ascent(
        self, outputs: Packed, targets: Targets, samples: int, progress: float | Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and for each tensor among the outputs the direction to backpropagate, None if it has no part.

        ``progress`` is the share of the steps that is done, 0 to 1, for all or per sample (N, 1).
        """
        values, direction = self.loss.ascent(outputs.tensors[0], targets.tree, progress)
        return values, [direction]

    def judge(self, outputs: Packed, targets: Targets, values: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples are adversarial, and which have lost their outputs to NaN or infinity, which is no success."""
        logits, labels = outputs.tensors[0], targets.tree
        predicted, lost = logits.argmax(1), undecided(logits)
        hit = predicted == labels if self.targeted else predicted != labels
        return hit > lost, lost


@dataclass(frozen=True)
class OneRival:
    """Logits (N, C) shall have their largest at another class than the label, and steps raise one such class alone.

    The tree of targets is the labels (N,), classes in order (N, R), and the turn (N,): which of these is raised.
    """

    largest_label: int

    def accept(self, outputs: Any, samples: int) -> Packed:
        """Logits with a class for every label."""
        return Packed(accept_logits(outputs, samples, self.largest_label))

    def values(self, outputs: Packed, targets: Targets, samples: int) -> Tensor:
        """The margin, (N,)."""
        return margin(outputs.tensors[0], targets.tree[0])

    def ascent(
        self, outputs: Packed, targets: Targets, samples: int, progress: float | Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The margin, and 1 at the rival and -1 at the label, which does not depend on the scale of the logits."""
        labels, rivals, turn = targets.tree
        direction = torch.zeros_like(outputs.tensors[0].detach())
        direction.scatter_(1, rivals.gather(1, turn[:, None]), 1.0).scatter_(1, labels[:, None], -1.0)
        return margin(outputs.tensors[0].detach(), labels), [direction]

    def judge(self, outputs: Packed, targets: Targets, values: Tensor) -> tuple[Tensor, Tensor]:
        """Decisions, whichever class they are for, and whether there is none."""
        logits, lost = outputs.tensors[0], undecided(outputs.tensors[0])
        return (logits.argmax(1) != targets.tree[0]) > lost, lost


def undecided(logits: Tensor) -> Tensor:
    """Which samples have no class: a logit is NaN, or the largest is infinite. -inf says that a class is left out."""
    return (logits.amax(1).abs() < torch.inf).logical_not_()  # NaN is not less either


@dataclass(frozen=True)
class HigherLoss:
    """Nothing is adversarial: the loss alone counts, of outputs and targets of any kind."""

    loss: Loss

    def accept(self, outputs: Any, samples: int) -> Packed:
        """Whatever the loss takes."""
        return Packed(outputs)

    def values(self, outputs: Packed, targets: Targets, samples: int) -> Tensor:
        """The loss, (N,)."""
        return self.loss.rate(outputs.tree(), targets.tree, samples)

    def ascent(
        self, outputs: Packed, targets: Targets, samples: int, progress: float | Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and its gradient at the outputs, scaled per sample; 0 if that is not finite: the sample stays."""
        values, gradients = self.loss.differentiated(outputs, targets.tree, samples)
        return values, _scaled(gradients, samples)

    def judge(self, outputs: Packed, targets: Targets, values: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is adversarial; a loss that is NaN or infinite is lost."""
        lost = values.isfinite().logical_not_()
        return torch.zeros_like(lost), lost


def _scaled(gradients: list[Tensor | None], samples: int) -> list[Tensor | None]:
    """Gradients whose largest entry per sample, over all outputs, is 1: so that none is lost in a narrower dtype."""
    known = [g for g in gradients if g is not None and g.numel()]
    if any(g.ndim == 0 or len(g) != samples for g in known):  # whose rows are whose, nobody knows
        return [None if g is None else g.nan_to_num(0.0, 0.0, 0.0) for g in gradients]
    largest = torch.stack([g.reshape(samples, -1).abs().amax(1) for g in known]).amax(0)
    usable = (largest > 0) & largest.isfinite()
    divisor = torch.where(usable, largest, 1.0)

    def of(gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        ones = (-1, *(1,) * (gradient.ndim - 1))
        return torch.where(usable.view(ones), gradient / divisor.view(ones), 0.0)

    return [of(g) for g in gradients]


Objective = AnotherClass | OneRival | HigherLoss
