"""Gradients of several outputs, from the gradients that came in at them."""

from collections.abc import Sequence

import torch
from torch import Tensor

_engine = torch.autograd.Variable._execution_engine


def gradients_of(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """As ``torch.autograd.grad``, for gradients that are known to have the outputs' shapes; None for unused inputs.

    That function compares shapes symbolically, for compiled code, and imports a package for it.
    """
    found: tuple[Tensor | None, ...] = _engine.run_backward(
        tuple(outputs), tuple(grads), retain_graph, False, tuple(inputs), True, accumulate_grad=False
    )
    return found


def filled_gradients_of(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor], *, retain_graph: bool = False
) -> list[Tensor]:
    """The same with zeros where no output depends on an input."""
    found = gradients_of(outputs, inputs, grads, retain_graph=retain_graph)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]
