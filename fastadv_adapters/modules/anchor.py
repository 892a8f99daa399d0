"""The one parameter of a fast model, by which libraries find its device."""

import torch
from torch import nn


class Anchor(nn.Parameter):
    """Tells libraries where a fast model is; whatever a parent module asks for, there is nothing to train."""

    @classmethod
    def on(cls, device: torch.device) -> "Anchor":
        """An empty one."""
        return cls(torch.empty(0, device=device), requires_grad=False)

    def requires_grad_(self, requires_grad: bool = True) -> "Anchor":
        """Change nothing."""
        return self
