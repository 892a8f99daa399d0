"""What a module holds, read where PyTorch keeps it: a class may have ``parameters()`` and the like of its own.

Those may give groups for an optimizer, a part of all, or other names; and a walk of PyTorch's goes through them.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, cast

from torch import Tensor, nn


def named_modules_of(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``root.named_modules()``: each part once, with itself, a part before those inside."""
    seen, stack = set[int](), [("", root)]
    while stack:
        name, part = stack.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield name, part
        inside = [(f"{name}.{key}" if name else key, own) for key, own in part._modules.items() if own is not None]
        stack += reversed(inside)


def modules_of(root: nn.Module) -> Iterator[nn.Module]:
    """As ``root.modules()``."""
    return (part for _, part in named_modules_of(root))


def children_of(part: nn.Module) -> Iterator[nn.Module]:
    """As ``part.children()``."""
    return iter({id(own): own for own in part._modules.values() if own is not None}.values())


def submodule_of(root: nn.Module, name: str) -> nn.Module:
    """As ``root.get_submodule(name)``; KeyError if there is none."""
    part: Any = root
    for key in name.split(".") if name else ():
        part = part._modules[key]
    return cast(nn.Module, part)


def named_parameters_of(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As ``root.named_parameters()``: each once."""
    return _named(root, "_parameters")


def parameters_of(root: nn.Module) -> Iterator[nn.Parameter]:
    """As ``root.parameters()``."""
    return (parameter for _, parameter in named_parameters_of(root))


def named_buffers_of(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As ``root.named_buffers()``: each once."""
    return _named(root, "_buffers")


def buffers_of(root: nn.Module) -> Iterator[Tensor]:
    """As ``root.buffers()``."""
    return (buffer for _, buffer in named_buffers_of(root))


def registered_in(root: nn.Module) -> Iterator[Tensor]:
    """All parameters, then all buffers."""
    return chain(parameters_of(root), buffers_of(root))


def _named(root: nn.Module, kind: str) -> Iterator[tuple[str, nn.Parameter]]:
    seen = set[int]()
    for prefix, part in named_modules_of(root):
        for key, tensor in getattr(part, kind).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}.{key}" if prefix else key, tensor
