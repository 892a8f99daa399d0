"""PGD attacks of foolbox that no saturated loss and no spoilt gradient makes weaker."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import eagerpy as ep
import foolbox
import torch
from foolbox.attacks.base import get_criterion
from foolbox.attacks.gradient_descent_base import BaseGradientDescent
from foolbox.criteria import Criterion, Misclassification, TargetedMisclassification
from foolbox.models import Model

from ..attack import accept_inputs, accept_size, resolve_loss
from ..boundary import watch_gradients
from ..modules import accept_flag
from .models import in_full_precision

T = TypeVar("T")


class _SafeSteps(BaseGradientDescent):
    """foolbox's gradient descent along gradients that no scale of the logits makes weaker, without NaN and infinities.

    What is climbed is the default loss of :class:`fastadv_adapters.SafePGD`, ``"auto"``. Criteria of foolbox carry
    classes only: for other targets (clean probabilities, soft labels, embeddings) use ``SafePGD`` itself.

    Works on any foolbox model of a PyTorch model. On a :class:`~fastadv_adapters.foolbox.FastPyTorchModel`, samples
    whose gradient was not finite in some step, and that are not adversarial yet, are attacked once more in full
    precision.
    """

    def __call__(self, model: Model, inputs: Any, criterion: Any, *, epsilons: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        """Run the attack as every foolbox attack is run, after a look at what came in.

        Raises:
            TypeError, ValueError: labels, budgets or inputs that cannot be attacked, or a ``random_start`` that is
                no bool; the text says why.
        """
        for epsilon in epsilons if isinstance(epsilons, Iterable) else [epsilons]:
            accept_size("epsilons", epsilon)
        accept_flag("random_start", self.random_start)
        x = ep.astensor(inputs).raw
        device = getattr(model, "device", x.device)
        accept_inputs(x, _classes(get_criterion(criterion)).raw, device, (model.bounds.lower, model.bounds.upper))
        return super().__call__(model, inputs, criterion, epsilons=epsilons, **kwargs)

    def get_loss_fn(self, model: Model, labels: ep.Tensor) -> Callable[[ep.Tensor], ep.Tensor]:
        """The logits times the direction of SafePGD's loss ``"auto"``, summed, whose gradient is that direction.

        The direction does not vanish, whatever the size of the logits, and the steps of these attacks are normalised.
        """
        largest = int(labels.max().item()) if len(labels) else -1
        loss, places = resolve_loss("auto"), labels.raw.to(torch.int64)
        share_done = itertools.chain((step / max(1, self.steps - 1) for step in range(self.steps)), itertools.repeat(1))

        def loss_fn(inputs: ep.Tensor) -> ep.Tensor:
            logits = model(inputs)
            if largest >= logits.shape[-1]:
                raise ValueError(
                    f"expected labels below {logits.shape[-1]}, the number of classes, got {largest}: count from 0"
                )
            _, direction = loss.ascent(logits.raw, places, next(share_done))
            return (logits * ep.astensor(direction)).sum()

        return loss_fn

    def value_and_grad(self, loss_fn: Callable[[ep.Tensor], ep.Tensor], x: ep.Tensor) -> tuple[ep.Tensor, ep.Tensor]:
        """Loss and gradient, with 0 for what is not finite."""
        loss, gradient = super().value_and_grad(loss_fn, x)
        return loss, ep.where(gradient.abs() < ep.inf, gradient, 0.0)

    def run(self, model: Model, inputs: T, criterion: Any, *, epsilon: float, **kwargs: Any) -> T:
        """Attack, then once more in full precision what lost gradient entries on the way."""
        x0, restore_type = ep.astensor_(inputs)
        criterion = get_criterion(criterion)
        with watch_gradients() as watch:
            x: ep.Tensor = super().run(model, x0, criterion, epsilon=epsilon, **kwargs)
        full = in_full_precision(model)
        if full is not None and watch.spoilt is not None and bool(watch.spoilt.any()):
            index = ep.astensor((watch.spoilt & ~criterion(x, model(x)).raw).nonzero().flatten())
            if len(index):
                again: Any = super().run(full, x0[index], _subset(criterion, index), epsilon=epsilon, **kwargs)
                x = ep.astensor(x.raw.index_copy(0, index.raw, again.raw))
        restored: T = restore_type(x)
        return restored


def _classes(criterion: Criterion) -> ep.Tensor:
    """The labels to leave, or the targets to reach."""
    if isinstance(criterion, Misclassification):
        return criterion.labels
    if isinstance(criterion, TargetedMisclassification):
        return criterion.target_classes
    raise TypeError(
        f"expected labels, Misclassification or TargetedMisclassification as criterion, got {type(criterion).__name__}"
    )


def _subset(criterion: Criterion, index: ep.Tensor) -> Criterion:
    return type(criterion)(_classes(criterion)[index])  # type: ignore[call-arg]


class SafeLinfPGD(_SafeSteps, foolbox.attacks.LinfProjectedGradientDescentAttack):
    """foolbox's ``LinfPGD`` with the default loss of :class:`fastadv_adapters.SafePGD`.

    The gradient of that loss neither vanishes nor depends on the scale of the logits. Entries of a gradient that
    are not finite become 0. On a fast model a sample that this happened to, and that is not adversarial yet, is
    attacked once more in full precision (on a processor only if it was not mended at once). As in foolbox all steps
    have one size, and the last iterate is returned.

    Calling it raises TypeError or ValueError for inputs, labels, budgets or a criterion that it cannot attack; criteria
    are labels, ``Misclassification`` and ``TargetedMisclassification``.

    Args:
        rel_stepsize: the size of a step relative to epsilon.
        abs_stepsize: the size of a step in units of the input; replaces ``rel_stepsize``.
        steps: how many gradient steps.
        random_start: whether to begin at a random point of the ball.
    """


class SafeL2PGD(_SafeSteps, foolbox.attacks.L2ProjectedGradientDescentAttack):
    """foolbox's ``L2PGD``, with arguments, loss and errors as of :class:`SafeLinfPGD`."""


class SafeL1PGD(_SafeSteps, foolbox.attacks.L1ProjectedGradientDescentAttack):
    """foolbox's ``L1PGD``, with arguments, loss and errors as of :class:`SafeLinfPGD`."""
