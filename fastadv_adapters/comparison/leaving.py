"""A model is lent: whatever attacks do to it meanwhile, it is as before afterwards."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ..modules import autocast, beside_parameters, in_eval_mode, parameters_of, without_gradients, write_back


@contextmanager
def lent_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients for a while, in its own precision even inside of ``torch.autocast``.

    Afterwards modes, gradients, ``requires_grad``, buffers and attributes are what they were.
    """
    saved = beside_parameters(model)
    try:
        with without_gradients(model), in_eval_mode(model), in_own_precision(model):
            yield
    finally:
        write_back(saved)


@contextmanager
def in_own_precision(model: nn.Module) -> Iterator[None]:
    """No autocast region of the caller lowers the model's passes; those of its own are as they are."""
    with ExitStack() as stack:
        for kind in {"cpu", *(parameter.device.type for parameter in parameters_of(model))} - {"meta"}:
            stack.enter_context(autocast(kind, None))
        yield


def plain(tensor: Tensor) -> Tensor:
    """The tensor outside of any graph, and one that autograd takes even if it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
