"""The one parameter of a fast model, by which libraries find its device."""

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class Anchor(nn.Parameter):
    """Tells libraries where a fast model is; whatever a parent module asks for, there is nothing to train."""

    @classmethod
    def on(cls, device: torch.device) -> "Anchor":
        """An empty one."""
        return cls(torch.empty(0, device=device), requires_grad=False)

    def requires_grad_(self, requires_grad: bool = True) -> "Anchor":
        """Change nothing."""
        return self


def _refuse_to_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if parameters and all(isinstance(p, Anchor) for p in parameters):
        raise ValueError(
            f"expected an optimizer of the wrapped model's parameters, got {type(optimizer).__name__} of a fast "
            f"model's, which has none to train: make it of fast.wrapped.parameters(), and the fast model follows"
        )


register_optimizer_step_pre_hook(_refuse_to_step)
