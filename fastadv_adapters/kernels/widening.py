"""Operators that autocast runs in float32 on CUDA, and not on a processor: here they run in float32 there too.

A probability near 1 is 1 in bfloat16, and the way back through a softmax multiplies by what it lacks of 1: the gradient
is gone. Layer and group norms are left alone, for their kernels sum in float32 anyway, and so are losses and the
operators ``**`` and ``/``, which round but once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree  # private by name, but what PyTorch's own transforms and exporters use

from ..modules import widen
from .multi_head import in_float32, multi_head

_Operator = Callable[..., Any]

NAMES = [
    *("cumprod", "cumsum", "prod", "sum", "logsumexp", "softmax", "log_softmax", "softmin", "softplus"),
    *("exp", "expm1", "log", "log10", "log1p", "log2", "pow", "reciprocal", "rsqrt"),
    *("acos", "arccos", "asin", "arcsin", "cosh", "sinh", "tan", "erfinv"),
    *("norm", "vector_norm", "matrix_norm", "normalize", "renorm"),
    *("cdist", "pdist", "dist", "pairwise_distance", "cosine_similarity"),
]


def _widening(operator: _Operator) -> _Operator:
    def widened(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("out") is not None:  # it would be written into a copy
            return operator(*args, **kwargs)
        args, kwargs = pytree.tree_map(widen, (args, kwargs))
        return operator(*args, **kwargs)

    return widened


def _operators() -> Iterator[_Operator]:
    """What PyTorch has under these names."""
    for name in NAMES:
        for place in (torch, Tensor, F, torch.special, torch.linalg):
            operator = getattr(place, name, None)
            if callable(operator):
                yield operator


WIDER: dict[_Operator, _Operator] = {
    **{operator: _widening(operator) for operator in _operators()},
    F.multi_head_attention_forward: multi_head(F.scaled_dot_product_attention),
}
"""What is run in the place of what."""

_attention = in_float32(F.scaled_dot_product_attention)

WIDER_IN_FLOAT16: dict[_Operator, _Operator] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: multi_head(_attention),
}
"""Likewise, for float16 alone: the way back through PyTorch's attention reads its output, rounded to 16 bits."""
