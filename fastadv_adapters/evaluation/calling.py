"""How a callable among the attacks wants to be called."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_MODELS = ("model", "net", "network", "f")
"""Names of a first parameter that is a model."""


def takes_model(function: Callable[..., Any]) -> bool:
    """Whether a callable takes ``(model, x, y)``, not ``(x, y)``: by its first name, or by three without a default."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # nothing that shows how it is called
        return False
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    with_model = required == 3 or (bool(positional) and positional[0].name in _MODELS)
    try:
        signature.bind(*range(3 if with_model else 2))
    except TypeError:
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"expected a callable (model, x, y) or (x, y) in attacks, got {name}{signature}: set all else before, with "
            f"functools.partial(..., eps=eps) say"
        ) from None
    return with_model


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a function takes, or what objects of a class are made with; nothing if it is in C and does not show it."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
