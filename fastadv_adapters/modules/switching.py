"""Eval mode of a model whose own ``train()`` does more than set flags: turns noise off, or computes a table."""

import torch
from torch import nn

from .inputs import is_out_of_memory
from .layouts import differ
from .walking import modules_of, parameters_of


def has_own_switch(model: nn.Module) -> bool:
    """Whether a part of a model has a ``train()`` or ``eval()`` of its own."""
    return any(map(_is_own, modules_of(model)))


def switch(copied: nn.Module, source: nn.Module) -> bool | None:
    """Have a copy, all of whose tensors are its own, go to eval mode in its own way; whether its weights are the same.

    None if that raises.

    A merged adapter writes into weights then, and another model builds new layers: their copies are left as they are.
    """
    parts, parameters = list(map(id, modules_of(copied))), list(map(id, parameters_of(copied)))
    try:
        with torch.no_grad():
            copied.eval()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
    if list(map(id, modules_of(copied))) != parts or list(map(id, parameters_of(copied))) != parameters:
        return False
    return not any(map(differ, parameters_of(copied), parameters_of(source)))


def _is_own(part: nn.Module) -> bool:
    kind = type(part)
    if kind.__module__.startswith("torch."):
        return False
    is_own = kind.train is not nn.Module.train or kind.eval is not nn.Module.eval
    return is_own or not {"train", "eval"}.isdisjoint(vars(part))
