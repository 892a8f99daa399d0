"""How near logits and gradients are to those of the same model in float64, sample by sample."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import copy_module


@dataclass(frozen=True)
class Pass:
    """What a gradient pass gives, in float64: logits (N, C), the gradient of the cross entropy as rows."""

    logits: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Agreement:
    """How a gradient pass agrees with the reference; tensors of shape (N,), one entry per sample.

    Attributes:
        logits_error: the largest difference of a logit, relative to the sample's largest reference logit.
        same_class: whether the largest logit is the reference's.
        cosine: with the reference's gradient, -1 to 1; a gradient of zeros has 0, one that is not finite NaN.
        signs: the share, 0 to 1, of entries with the reference's sign, of those that are not 0 there.
        zero: whether every entry of the gradient is 0.
        spoilt: whether an entry of the gradient, or a logit, is not finite.
    """

    logits_error: Tensor
    same_class: Tensor
    cosine: Tensor
    signs: Tensor
    zero: Tensor
    spoilt: Tensor


def gradient_pass(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    """Logits and input gradient of the summed cross entropy, as the model gives them."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        logits: Tensor = model(leaf)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), leaf)
    return Pass(logits.detach().cpu().double(), gradient.cpu().double().flatten(1))  # not every device has float64


def reference_pass(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Pass, torch.dtype]:
    """The pass in float64, on a copy; in the model's own precision if it, or the device, cannot; and in which dtype."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gradient_pass(copy_module(model, _in_float64), x.double(), y), torch.float64
    except Exception:  # it casts to float32 by itself, or asks for it, or the device has no float64
        return gradient_pass(model, x, y), x.dtype


def _in_float64(tensor: Tensor) -> Tensor:
    wide: Any = tensor.detach().double() if tensor.is_floating_point() else tensor.detach().clone()
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


def agreement(found: Pass, reference: Pass) -> Agreement:
    """Compare a pass with the reference."""
    gradient, exact = found.gradient, reference.gradient
    largest = reference.logits.where(reference.logits.isfinite(), 0.0).abs().amax(1).clamp(min=1e-300)
    counted = exact != 0
    same = (gradient.sign() == exact.sign()) & counted
    left_out = (reference.logits == -torch.inf) & (found.logits == -torch.inf)  # a class that is left out
    return Agreement(
        logits_error=(found.logits - reference.logits).where(~left_out, 0.0).abs().amax(1) / largest,
        same_class=found.logits.argmax(1) == reference.logits.argmax(1),
        cosine=row_cosines(gradient, exact),
        signs=same.sum(1).double() / counted.sum(1).clamp(min=1),
        zero=~gradient.any(1),
        spoilt=~(gradient.isfinite().all(1) & (found.logits.isfinite() | left_out).all(1)),
    )


def row_cosines(left: Tensor, right: Tensor) -> Tensor:
    """Cosine of every row, free of underflow: gradients of confident networks go down to 1e-30."""
    rows = [row / row.abs().amax(1, keepdim=True).clamp(min=1e-300) for row in (left, right)]
    return torch.cosine_similarity(rows[0], rows[1], 1)
