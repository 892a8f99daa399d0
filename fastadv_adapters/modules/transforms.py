"""The transforms of ``torch.func``: seen, as is forward-mode differentiation, and left for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(tensors: Sequence[Tensor] = ()) -> bool:
    """Whether a transform or forward-mode differentiation is at work, which needs the plain operators."""
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None or any(map(functorch.is_functorch_wrapped_tensor, tensors)):
        return True
    return bool(forward_ad._current_level >= 0)


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """For what does not belong to the function that is transformed: in a transform it could not write into tensors."""
    functorch = torch._C._functorch
    left = []
    try:
        while functorch.peek_interpreter_stack() is not None:
            left.append(functorch.pop_dynamic_layer_stack())
        yield
    finally:
        while left:
            functorch.push_dynamic_layer_stack(left.pop())
