"""What an attack maximises: one value per sample, computed from logits, whose gradient does not vanish."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..boundary import Packed
from ..modules import accept_flag
from .directions import Ascent, Reversed, auto_ascent, check_classes, cross_entropy_ascent, margin_ascent, others, own

LossFunction = Callable[[Any, Any], Tensor]
"""Logits (N, C) and labels (N,) to one value per sample (N,), to be maximised; without classes the model's outputs and
targets, of any kind."""

LossName = Literal["auto", "ce", "dlr", "margin"]
"""``"auto"``, ``"ce"``, ``"dlr"`` or ``"margin"``: the names that :func:`resolve_loss` knows and explains."""

LOSSES: tuple[LossName, ...] = get_args(LossName)


@dataclass(frozen=True)
class Loss:
    """A loss to be maximised, and the direction in which the logits raise it.

    Attributes:
        name: how the user called it.
        function: logits (N, C), labels (N,) -> (N,). In targeted attacks the labels are the targets.
        closed: computes values and directions by formula, called as :meth:`ascent`; None: autograd computes them.
        fallback: called likewise; gives the direction of a sample whose gradient of ``function`` is all zero or not
            finite. None if there is a ``closed``.
        repeats: whether a sample's direction depends on its logits and its label alone. That of ``"auto"`` depends on
            the step, too, and that of a callable may depend on other samples or on random numbers.
    """

    name: str
    function: LossFunction
    closed: Ascent | None = None
    fallback: Ascent | None = None
    repeats: bool = False

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """One value per sample, shape (N,).

        Raises:
            ValueError: the loss gave another shape.
        """
        return self.rate(logits, labels, len(labels))

    def rate(self, outputs: Any, targets: Any, samples: int) -> Tensor:
        """The same of outputs and targets of any kind, of so many samples.

        The function is given copies, which it may write into; gradients pass through those of the outputs. If it raises
        an error, as tensors of its own in float32 make it (class weights, embeddings, a head), it is given outputs in
        float32.
        """
        try:
            values: object = self.function(_copies(outputs), _copies(targets))
        except RuntimeError as error:
            values = self._in_float32(outputs, targets, error)
        if not isinstance(values, Tensor) or values.shape != (samples,):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"expected the loss to give one value per sample, shape {(samples,)}, got {got}. "
                f'Return it without reduction over the batch (reduction="none")'
            )
        return values

    def _in_float32(self, outputs: Any, targets: Any, error: RuntimeError) -> Any:
        try:
            return self.function(_copies(outputs, narrow=True), _copies(targets))
        except Exception:
            raise error from None
        finally:
            del error  # its traceback knows this frame

    def ascent(self, logits: Tensor, labels: Tensor, progress: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
        """Values (N,) and, per sample, the direction at the logits (N, C) to backpropagate; both without history.

        The direction is the gradient up to a positive factor per sample; that of ``"auto"`` is no gradient, and changes
        with the share of the steps that is done, ``progress``, 0 to 1.
        """
        logits = logits.detach()
        if self.closed is not None:
            return self.closed(logits, labels, progress)
        values, gradients = self.differentiated(Packed(logits), labels, len(labels))
        direction: Any = gradients[0]  # never None: of one tensor, that is an error
        if self.fallback is not None:
            largest = direction.abs().amax(1, keepdim=True)
            usable = (largest > 0) & largest.isfinite()
            direction = torch.where(usable, direction / largest, self.fallback(logits, labels, progress)[1])
        return values, direction

    def differentiated(self, outputs: Packed, targets: Any, samples: int) -> tuple[Tensor, list[Tensor | None]]:
        """Values (N,) and their gradients at each tensor of the outputs, by autograd; None if one has no part in them.

        Raises:
            ValueError: the values have no gradient, or another shape.
        """
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in outputs.tensors]
            values = self.rate(outputs.rebuild(leaves), targets, samples)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            try:
                found = _gradients(values, wanted)
            except RuntimeError as error:  # of two dtypes, which some losses bear in the forward pass alone
                values = self._in_float32(outputs.rebuild(leaves), targets, error)
                found = _gradients(values, wanted)
        if all(gradient is None for gradient in found):
            raise ValueError(
                f"expected a loss that can be differentiated by the logits, got values of {self.name} without "
                f"a gradient. Compute them from the logits alone, without argmax or detach()"
            )
        each = iter(found)
        return values.detach(), [next(each) if leaf.requires_grad else None for leaf in leaves]


def _gradients(values: Tensor, wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
    if not (values.requires_grad and wanted):  # it may be of parameters of the loss alone
        return ()
    return torch.autograd.grad(values.sum(), wanted, allow_unused=True)


def asked_of(loss: LossName | LossFunction | Loss) -> LossName | LossFunction | Loss:
    """What :func:`resolve_loss` has made a loss of; all else, a loss that was made otherwise too, as it is."""
    if isinstance(loss, Loss):
        for asked in (*LOSSES, loss.function):
            if not isinstance(asked, Loss) and loss in (resolve_loss(asked), resolve_loss(asked, targeted=True)):
                return asked
    return loss


def resolve_loss(loss: LossName | LossFunction | Loss, targeted: bool = False) -> Loss:
    """The loss that a user asked for.

    Args:
        loss: ``"margin"``, the largest other logit minus the label's; ``"auto"``, which ranks by the margin and steps
            in a direction that does not depend on the scale of the logits; ``"ce"``, the safe cross entropy, which
            does not saturate; ``"dlr"``, the difference of logits ratio (Croce and Hein 2020, arXiv:2003.01690); or a
            callable with logits (N, C) and labels (N,) as arguments that returns (N,) values to be maximised. A
            callable is maximised in targeted attacks too, with the targets as its labels, and so is a :class:`Loss`,
            which is taken as it is.
        targeted: whether labels are targets to be reached instead of classes to be left.

    Returns:
        The :class:`Loss`. Calling it raises ValueError if there are fewer classes than it compares (2, for ``"dlr"`` 3,
        for a targeted ``"dlr"`` 4). Where the gradient of ``"dlr"`` or of a callable is all zero or not finite,
        :meth:`Loss.ascent` gives the direction of the margin. In a targeted ``"dlr"`` the largest logit of another
        class stands in the place of the true class's.

    Raises:
        ValueError: unknown name, or ``targeted`` is no bool.
        TypeError: neither a name nor a callable.
    """
    fallback = Reversed(margin_ascent) if accept_flag("targeted", targeted) else margin_ascent
    if isinstance(loss, Loss):
        return loss
    if callable(loss):
        return Loss(getattr(loss, "__name__", type(loss).__name__), loss, fallback=fallback)
    choices = f"one of {', '.join(map(repr, LOSSES))} or a callable loss(logits, labels) -> (N,)"
    if not isinstance(loss, str):
        raise TypeError(f"expected loss to be {choices}, got {type(loss).__name__}. Pass one of these")
    if loss == "auto":
        closed = Reversed(auto_ascent) if targeted else auto_ascent
        return Loss(loss, Negative(auto) if targeted else auto, closed)
    if loss == "ce":
        closed = Reversed(cross_entropy_ascent) if targeted else cross_entropy_ascent
        return Loss(loss, Negative(cross_entropy) if targeted else cross_entropy, closed, repeats=True)
    if loss == "margin":
        return Loss(loss, Negative(margin) if targeted else margin, fallback, repeats=True)
    if loss == "dlr":
        return Loss(loss, dlr_targeted if targeted else dlr, fallback=fallback, repeats=True)
    raise ValueError(f"expected loss to be {choices}, got {loss!r}. Choose one of these")


def _copies(tree: Any, *, narrow: bool = False) -> Any:
    packed = Packed(tree)
    return packed.rebuild([t.float() if narrow and t.dtype == torch.float64 else t.clone() for t in packed.tensors])


@dataclass(frozen=True)
class Negative:
    """A loss with the other sign; an object and no lambda, so that attacks can be pickled."""

    function: LossFunction

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """One value per sample, (N,)."""
        return -self.function(logits, targets)


def auto(logits: Tensor, labels: Tensor) -> Tensor:
    """What ``"auto"`` ranks candidates by: the margin, shape (N,).

    Its steps follow a direction of their own, with several classes in it, that does not depend on the scale of the
    logits (:func:`~fastadv_adapters.attack.directions.auto_ascent`). Nor does the order of candidates by the margin,
    and its sign alone says whether a candidate is adversarial; the cross entropy has the first only of large logits.
    """
    check_classes(logits, 2, "auto")
    return margin(logits, labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The safe cross entropy: ``m = logsumexp over j != y of z_j - z_y``, shape (N,).

    The cross entropy is ``log(1 + exp(m))``: it grows with m, and its gradient is that of m times sigmoid(m). Steps of
    an attack follow the gradient's direction alone, so m gives the same steps. But sigmoid(m) vanishes once the model
    is sure (below m = -104 in float32, -17 in float16), while the gradient of m has -1 at the label and a softmax over
    the other classes, in every dtype; nor is the entry at the label a difference of nearly equal numbers, as
    ``softmax - one_hot`` has.
    """
    check_classes(logits, 2, "ce")
    return others(logits, labels).logsumexp(1) - own(logits, labels)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``max over j != y of z_j - z_y``, shape (N,): positive if the label is not predicted."""
    check_classes(logits, 2, "margin")
    return others(logits, labels).amax(1) - own(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, shape (N,): the margin divided by the largest logit minus the third largest.

    It does not change when the logits are scaled or shifted (Croce and Hein 2020, arXiv:2003.01690, equation 6).
    """
    check_classes(logits, 3, "dlr")
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + _TINY)


def dlr_targeted(logits: Tensor, labels: Tensor) -> Tensor:
    """The targeted difference of logits ratio (same paper, equation 7), shape (N,); the labels are the targets.

    The paper compares the target's logit with that of the true class, which a targeted attack is not told; here the
    largest logit of any other class stands in its place.
    """
    check_classes(logits, 4, "dlr of a targeted attack")
    top = logits.topk(4, dim=1).values
    return -margin(logits, labels) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY)


_TINY = 1e-12  # in the authors' code too, for logits that are all equal
