"""Whether code may read or replace weights where a trace does not show it: of what is folded, these are others."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from ..modules import functions_in, named_modules_of, names_in

_READS_ALL = "for p in self.parameters()"
_OF_ALL = (_READS_ALL, "_parameters", "named_parameters", "get_parameter", "state_dict", "functional_call")
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
    known = dict[type, set[str]]()
    for name, part in named_modules_of(root):
        kind = type(part)
        if kind.__module__.startswith("torch.nn.modules."):
            continue
        found = known[kind] if kind in known else known.setdefault(kind, _names_in_forward(kind))
        if not found.isdisjoint((*_OF_ALL, *_OF_ONE) if name in opaque else _OF_ALL):
            yield part


def _names_in_forward(kind: type) -> set[str]:
    """The names in the code of a forward, its base classes' included, and of the methods that these name."""
    found, waiting = set[str](), {"forward"}
    while waiting:
        name = waiting.pop()
        for base in kind.__mro__:
            if base.__module__.startswith("torch."):
                continue
            new = _names_in_method(vars(base).get(name)) - found
            found |= new
            waiting |= new - {"forward"}
    return found


def _names_in_method(method: Any) -> set[str]:
    functions = functions_in(method)
    if not functions:
        return set()
    names = set(names_in(functions[-1].__code__))  # a decorator that looks at a signature names its parameters
    return names | {_READS_ALL} if _ANY in names and "next" not in names else names
