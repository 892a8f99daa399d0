"""Who a model is, and what ran it: what an evaluation that goes on has to share with its beginning."""

import hashlib
import importlib.metadata
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import FastAttackModel
from ..modules import attributes_of, inside_of, refusals_borne
from .content import bytes_of
from .stages import Attack

_FEW = 64
"""A tensor in an attribute with more entries is no setting: it may be an activation that was stored."""


def model_hash(model: nn.Module) -> str:
    """Of all parameters and buffers, their names, dtypes and shapes; and of the modules' classes and settings."""
    digest = hashlib.blake2b(digest_size=16)
    for name, part in model.named_modules():
        digest.update(repr((name, type(part).__qualname__, _settings(part))).encode())
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        digest.update(bytes_of(dense))
    return digest.hexdigest()


def _settings(part: nn.Module) -> list[object]:
    """What a module prints of itself, and numbers in its attributes: the mean that a normalisation takes off, say."""
    own = {name: _constant(value) for name, value in attributes_of(part).items()}
    printed = ""
    with refusals_borne():  # it is the user's code
        printed = re.sub(r" at 0x[0-9a-f]+", "", part.extra_repr())
    return [printed, sorted((name, value) for name, value in own.items() if value)]


def _constant(value: Any) -> str:
    """A setting as text; empty for what is none: integers count calls or processes, and texts name devices."""
    if isinstance(value, (bool, float, complex)):
        return repr(value)
    if isinstance(value, Tensor):
        small = value.numel() <= _FEW and value.layout == torch.strided and not value.requires_grad
        return repr(value.tolist()) if small else ""
    if isinstance(value, (list, tuple)):
        return ", ".join(repr(item) if isinstance(item, int) else _constant(item) for item in value)
    return ""


def versions(attacks: Iterable[Attack]) -> dict[str, str]:
    """Of this package, of PyTorch, and of the libraries that attacks come from."""
    libraries = {library for attack in attacks for library in attack.libraries}
    own = importlib.import_module("fastadv_adapters").__version__
    return {"fastadv_adapters": own, "torch": torch.__version__} | {
        name: importlib.metadata.version(name) for name in sorted(libraries)
    }


def options_text(options: dict[str, Any]) -> dict[str, str]:
    """Options of a fast model for the header."""
    return {name: str(value) for name, value in sorted(options.items())}


def unwrapped(model: Any) -> Any:
    """The module inside containers that only run it elsewhere or otherwise: DataParallel, ``torch.compile``."""
    while isinstance(model, nn.Module) and (inside := inside_of(model)) is not None:
        model = inside
    return model


def are_one(attacked: Any, model: nn.Module) -> bool:
    """Whether these are the same model, wrapped or not: they share a parameter. A function may be anything."""
    inner = attacked.wrapped if isinstance(attacked, FastAttackModel) else attacked
    if not isinstance(inner, nn.Module):
        return True
    own = {id(parameter) for parameter in model.parameters()}
    return inner is model or any(id(parameter) in own for parameter in inner.parameters())
