"""Who a model is, and what ran it: what an evaluation that goes on has to share with its beginning."""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import FastAttackModel
from ..modules import inside_of
from .content import bytes_of
from .stages import Attack


def model_hash(model: nn.Module) -> str:
    """Of all parameters and buffers, their names, dtypes and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        digest.update(bytes_of(dense))
    return digest.hexdigest()


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
