"""What surrounds a call of an operator: processor, dtype, library."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..modules import HAS_AMX, HAS_AVX512, HAS_AVX512_BF16

__all__ = ["DTYPES", "HAS_AMX", "HAS_AVX512", "HAS_AVX512_BF16", "is_onednn", "runs_in", "unseen"]

DTYPES = (torch.float32, torch.bfloat16)
"""In which weights of a processor are laid out, or its gradients computed otherwise."""


def runs_in(input: Tensor) -> torch.dtype:
    """The dtype in which a convolution or product on a processor runs: that of autocast, or its input's."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype


@contextmanager
def unseen() -> Iterator[None]:
    """Compute from weights what is kept here: a mode that looks at functions would keep it once more."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        yield


def is_onednn(layer: Any, input: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN runs this convolution; in bfloat16 it does not on processors without AVX512."""
    # It looks at shapes, dtypes and devices alone.
    like_input = input if input.dtype == weight.dtype else weight.new_empty(()).expand(input.shape)
    moves = layer.stride, layer.padding, layer.dilation, False, (0,) * (input.ndim - 2), layer.groups
    return bool(torch._C._select_conv_backend(like_input, weight, layer.bias, *moves).name == "Mkldnn")
