"""A model itself in eval mode, or beside runs of its copies, for a while; left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .copying import clone, switches_attributes
from .holding import own_tensors, tensors_in_containers
from .layouts import differ, write
from .methods import are_listed
from .restoring import Restore
from .walking import modules_of, parameters_of

Saved = list[tuple[Tensor, Tensor]]
"""Tensors of a model, each with a copy of what was in it."""


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model itself in eval mode for a while, as copies are; its modes and attributes are as before afterwards."""
    restore, saved = Restore(model), Saved()
    try:
        if model.training and switches_attributes(model):
            saved = beside_parameters(model)
            with torch.no_grad():
                model.eval()
        for part in modules_of(model):
            part.training = False
        yield
    finally:
        restore()
        write_back(saved)


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """No gradients on its parameters for a while, for code may call ``backward()``; ``requires_grad`` stays, too."""
    gradients = [(p, p.grad, p.requires_grad) for p in parameters_of(model)]
    try:
        for parameter, _, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, grad, required in gradients:
            if parameter.requires_grad != required:  # one that was made in inference mode takes no flag
                parameter.requires_grad_(required)
            parameter.grad = grad


@contextmanager
def unwritten_by_copies(model: nn.Module) -> Iterator[None]:
    """The model left as it was by runs of copies, which reach it through a list of a class."""
    if not are_listed(model):
        yield
        return
    restore, saved = Restore(model), beside_parameters(model)
    try:
        yield
    finally:
        restore()
        write_back(saved)


def beside_parameters(model: nn.Module) -> Saved:
    """Buffers, and tensors in attributes, containers and data objects, which code may write into."""
    tensors = (t for t in (*own_tensors(model), *tensors_in_containers(model)) if not isinstance(t, nn.Parameter))
    return [(tensor, clone(tensor)) for tensor in tensors if not tensor.is_quantized]


def write_back(saved: Saved) -> None:
    """Write into these tensors, where they have changed, what was in them."""
    for tensor, value in saved:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if differ(tensor, value):
                write(tensor, value)
