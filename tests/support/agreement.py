"""Whether a fast model agrees with a plain one, and training steps in between; shared by tests of whole models."""

from typing import Any

import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from tests.support.tools import cosine, input_gradient


def weighed(outputs: Tensor, _: Tensor | None = None) -> Tensor:
    """A loss that every entry enters with another weight."""
    return (outputs * torch.linspace(-1, 1.5, outputs.numel()).view_as(outputs)).sum()


def agrees(fast: FastAttackModel, plain: nn.Module, x: Tensor, *more: Any) -> None:
    """Gradients and values without gradient as those of ``plain``, which is in eval mode."""
    x = x.detach()
    expected = input_gradient(lambda x: plain(x, *more), x, x, weighed)
    assert expected.flatten(1).any(1).all()
    found = input_gradient(lambda x: fast(x, *more), x, x, weighed)
    assert (cosine(found, expected) > 0.9999).all()
    with torch.no_grad():
        torch.testing.assert_close(fast(x, *more), plain(x, *more))


def train_a_step(model: nn.Module, x: Tensor) -> None:
    """One step of SGD in training mode on what may be trained."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    weighed(model(x)).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
