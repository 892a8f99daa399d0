"""A model is lent: whatever attacks do to it meanwhile, it is as before afterwards."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..modules import autocast, clone, differ, in_eval_mode, write


@contextmanager
def lent_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients for a while, in its own precision even inside of ``torch.autocast``.

    Afterwards modes, gradients, ``requires_grad``, buffers and attributes are what they were.
    """
    parts, parameters = list(model.modules()), list(model.parameters())
    dicts = [held for part in parts for held in (vars(part), part._buffers)]
    before = [dict(held) for held in dicts]
    held_tensors = [t for held in before for t in held.values() if isinstance(t, Tensor) and not t.is_quantized]
    tensors = [(t, clone(t)) for t in held_tensors]
    gradients = [(p, p.grad, p.requires_grad) for p in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        with in_eval_mode(model), in_own_precision(model):
            yield
    finally:
        for held, old in zip(dicts, before, strict=True):
            for name in held.keys() - old.keys():
                del held[name]
            held.update(old)
        _write_back(tensors)
        for parameter, grad, required in gradients:
            if parameter.requires_grad != required:  # one that was made in inference mode takes no flag
                parameter.requires_grad_(required)
            parameter.grad = grad


@contextmanager
def in_own_precision(model: nn.Module) -> Iterator[None]:
    """No autocast region of the caller lowers the model's passes; those of its own are as they are."""
    with ExitStack() as stack:
        for kind in {"cpu", *(parameter.device.type for parameter in model.parameters())} - {"meta"}:
            stack.enter_context(autocast(kind, None))
        yield


def _write_back(tensors: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in tensors:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if differ(tensor, value):
                write(tensor, value)


def plain(tensor: Tensor) -> Tensor:
    """The tensor outside of any graph, and one that autograd takes even if it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
