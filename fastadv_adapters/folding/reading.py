"""Whether code may read or replace weights where a trace does not show it: of what is folded, these are others."""

import types
from collections.abc import Collection, Iterator

from torch import nn

_OF_ALL = ("_parameters", "named_parameters", "get_parameter", "state_dict", "functional_call")
"""In a forward, these names tell that it reads, or replaces, weights of all layers inside, which a trace hides."""

_ANY = "parameters"
"""Likewise, but ``next(self.parameters())`` only asks for a dtype or a device."""

_OF_ONE = ("weight", "bias")
"""These a trace shows, if there is one."""


def read_unseen(root: nn.Module, opaque: Collection[str]) -> Iterator[nn.Module]:
    """The modules whose code may read weights of the layers inside, unseen.

    Args:
        root: the module that has been traced.
        opaque: names of the modules that do not trace.
    """
    names = dict[type, set[str]]()
    for name, part in root.named_modules():
        kind = type(part)
        if kind.__module__.startswith("torch.nn.modules."):
            continue
        found = names[kind] if kind in names else names.setdefault(kind, _names_in_forward(kind))
        reads_any = _ANY in found and "next" not in found
        if reads_any or not found.isdisjoint((*_OF_ALL, *_OF_ONE) if name in opaque else _OF_ALL):
            yield part


def _names_in_forward(kind: type) -> set[str]:
    """The names in the code of a forward, and of the methods of its class that these name."""
    found, waiting = set[str](), {"forward"}
    while waiting:
        name = waiting.pop()
        method = getattr(kind, name, None)
        if isinstance(method, types.FunctionType) and method is not getattr(nn.Module, name, None):
            new = set(_names(method.__code__)) - found
            found |= new
            waiting |= new
    return found


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
