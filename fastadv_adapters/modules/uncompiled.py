"""Code that ``torch.compile`` is to leave as it is, if the code that calls it is compiled."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: as ``torch.compiler.disable``, whose import takes longer than all others, and is often for nothing."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            left_alone: Callable[P, T] = torch.compiler.disable(function)
            return left_alone(*args, **kwargs)
        return function(*args, **kwargs)

    return run
