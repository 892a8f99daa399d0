"""Who a model is, and what ran it: what an evaluation that goes on has to share with its beginning."""

import hashlib
import importlib.metadata
import numbers
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import FastAttackModel
from ..modules import attributes_of, inside_of, named_buffers_of, named_modules_of, named_parameters_of, parameters_of
from .content import bytes_of, digest
from .stages import Attack

OF_A_PROCESS = re.compile("rank|device|gpu")
"""In names of attributes: they tell a process from others, and not a model."""


def model_hash(model: nn.Module) -> str:
    """A hash of the modules' classes, and of all parameters and buffers with their names, dtypes and shapes."""
    whole = hashlib.blake2b(digest_size=16)
    for name, part in named_modules_of(model):
        is_of_torch = type(part).__module__.partition(".")[0] in ("torch", "torchvision")
        printed = part.extra_repr() if is_of_torch else ""  # that of others may count, say
        whole.update(repr((name, type(part).__qualname__, printed)).encode())
    tensors: list[tuple[str, Tensor]] = [*named_parameters_of(model), *named_buffers_of(model)]
    for name, tensor in tensors:
        whole.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        whole.update(bytes_of(tensor))
    return whole.hexdigest()


def settings_of(model: nn.Module) -> dict[str, str]:
    """Numbers and tensors in attributes, which may decide what a model computes: the mean of a normalisation, say.

    (Texts are left out, for they name devices and runs.)
    """
    found: dict[str, str] = {}
    for name, part in named_modules_of(model):
        for attribute, value in attributes_of(part).items():
            if (text := _constant(value)) and not OF_A_PROCESS.search(attribute):
                found[f"{name}.{attribute}".lstrip(".")] = text
    return found


def _constant(value: Any) -> str:
    """A setting as text; empty for what is none."""
    if isinstance(value, numbers.Number):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {digest(bytes_of(value))}"
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(_constant, value)))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {text}" for key, item in value.items() if (text := _constant(item)))
    return ""


def versions(attacks: Iterable[Attack]) -> dict[str, str]:
    """The versions of this package, of PyTorch, and of the libraries that attacks come from."""
    libraries = {library for attack in attacks for library in attack.libraries}
    own = importlib.import_module("fastadv_adapters").__version__
    return {"fastadv_adapters": own, "torch": torch.__version__} | {
        name: importlib.metadata.version(name) for name in sorted(libraries)
    }


def unwrapped(model: Any) -> Any:
    """The module inside containers that only run it elsewhere or otherwise: DataParallel, ``torch.compile``."""
    while isinstance(model, nn.Module) and (inside := inside_of(model)) is not None:
        model = inside
    return model


def are_one(attacked: Any, model: nn.Module) -> bool:
    """Whether these compute the same, wrapped or not: they are one, or alike with the same parameters.

    A part of a model is another model. A function may be anything.
    """
    inner, whole = (unwrapped(one.wrapped if isinstance(one, FastAttackModel) else one) for one in (attacked, model))
    if inner is whole or not isinstance(inner, nn.Module):
        return True
    own, others = ([id(parameter) for parameter in parameters_of(one)] for one in (inner, whole))
    return own == others and model_hash(inner) == model_hash(whole) and settings_of(inner) == settings_of(whole)
