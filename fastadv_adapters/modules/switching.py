"""Eval mode of a model whose own ``train()`` does more than set flags: turns noise off, or takes another graph."""

import torch
from torch import nn

from .inputs import is_out_of_memory
from .layouts import differ


def has_own_switch(model: nn.Module) -> bool:
    """Whether a part of a model has a ``train()`` or ``eval()`` of its own."""
    return any(_is_own(part) for part in model.modules())


def switch(copied: nn.Module, source: nn.Module) -> bool:
    """Have a copy, all of whose tensors are its own, go to eval mode in its own way; whether that is all it did.

    A merged adapter writes into weights then, and another model builds new layers. Such a copy is of no use any more.
    """
    parts, tensors = list(copied.modules()), _tensors(source)
    try:
        with torch.no_grad():
            copied.train(False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    now = _tensors(copied)
    same = len(now) == len(tensors) and all(map(_is_same, now, tensors))
    return same and [id(part) for part in copied.modules()] == [id(part) for part in parts]


def _is_own(part: nn.Module) -> bool:
    kind = type(part)
    if kind.__module__.startswith("torch."):
        return False
    is_own = kind.train is not nn.Module.train or kind.eval is not nn.Module.eval
    return is_own or not {"train", "eval"}.isdisjoint(vars(part))


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _is_same(now: torch.Tensor, before: torch.Tensor) -> bool:
    return now.shape == before.shape and now.dtype == before.dtype and not differ(now, before)
