"""PyTorch's multi-head attention with other operators inside. To a mode that looks at operators it is one call.

If the weights of the attention are asked for, as they are by default, it computes scores, softmax and products one by
one, in 16 bits under autocast: large scores are off, and a probability near 1 is 1. Here these are in float32.
"""

from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree  # private by name, but what PyTorch's own transforms and exporters use

from ..modules import widen

_Operator = Callable[..., Any]


def multi_head(attention: _Operator) -> _Operator:
    """PyTorch's own code, with this attention where no weights are asked for."""
    own = F.multi_head_attention_forward
    others = {
        "torch": _in_place_of(torch, bmm=in_float32(torch.bmm), baddbmm=in_float32(torch.baddbmm)),
        "softmax": in_float32(F.softmax),
        "scaled_dot_product_attention": attention,
        # It does not ask whether there is another mode around it, which would be given PyTorch's own function.
        "has_torch_function": lambda _: False,
    }
    return FunctionType(own.__code__, {**vars(F), **others}, argdefs=own.__defaults__)


def _in_place_of(module: ModuleType, **others: _Operator) -> ModuleType:
    """A module with other operators under these names."""
    stand_in = ModuleType(module.__name__)
    vars(stand_in).update({**vars(module), **others})
    return stand_in


def in_float32(operator: _Operator) -> _Operator:
    """An operator that autocast runs in 16 bits on a processor, run in float32."""

    def widened(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(widen, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return operator(*args, **kwargs)

    return widened
