"""Group norm of channels-last images in bfloat16 on a processor, computed in float32: PyTorch's own in 16 bits is slow.

Its kernel takes several times as long as that in float32. Statistics are in float32 in both.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import become, is_transformed


class _InFloat32:
    """Mixin for a group norm."""

    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """Normalise in float32, and hand out the dtype of the input."""
        if input.dtype != torch.bfloat16 or torch.compiler.is_compiling() or is_transformed():
            output: Tensor = super().forward(input)  # type: ignore[misc]
            return output
        weight, bias = (None if tensor is None else tensor.float() for tensor in (self.weight, self.bias))
        return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)


def widen_group_norm(part: nn.Module, device: torch.device) -> None:
    """Have a layer of exactly PyTorch's class normalise in float32, on a processor."""
    if device.type == "cpu" and type(part) is nn.GroupNorm:
        become(part, _InFloat32)
