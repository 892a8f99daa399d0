"""What surrounds a call of an operator: the dtype that it runs in, and whether a transform is at work."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def runs_in(input: Tensor) -> torch.dtype:
    """The dtype in which a convolution or product on a processor runs: that of autocast, or its input's."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is at work, which wants plain operators."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
