"""What is given for data by mistake and can be iterated over, so that it would be misread: told what to do instead."""

import functools
import numbers
import os
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

POSITIONAL = 3
"""So many arguments of ``evaluate`` come without a name: model, data and attacks."""


def refuse_lookalikes(data: Any) -> None:
    """Raise TypeError for a path, images without labels, arrays of NumPy, lists of numbers, or a dictionary."""
    if isinstance(data, (str, os.PathLike)):
        raise TypeError(
            f"expected data as tensors, a DataLoader or a Dataset, got the {_kind(data)} {str(data)!r}: load it, and "
            f"pass a pair (x, y); or give it to the command: fastadv evaluate --data"
        )
    if isinstance(data, Mapping):
        names = ", ".join(map(repr, data))
        raise TypeError(f"expected data as a pair (x, y), got a {_kind(data)} with {names}: take images and labels out")
    if _is_array(data):
        converted = "" if isinstance(data, Tensor) else "; torch.from_numpy makes tensors of arrays"
        raise TypeError(
            f"expected data with images and labels, got one {_kind(data)}: pass them as one pair, "
            f"evaluate(model, (x, y), attacks, eps=...){converted}"
        )
    is_pair = isinstance(data, (tuple, list)) and len(data) == 2 and (any(map(_is_array, data)) or _labels(data[1]))
    if is_pair and not all(isinstance(part, Tensor) for part in data):
        kinds = " and ".join(map(_kind, data))
        raise TypeError(
            f"expected data as a pair of tensors (x, y), got {kinds}: pass (torch.from_numpy(x), torch.from_numpy(y)), "
            f"and torch.tensor of what is a list"
        )


def with_one_data(function: Callable[P, R]) -> Callable[P, R]:
    """A function of model, data and attacks that says so if images and labels are two arguments."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > POSITIONAL or (len(args) == POSITIONAL and "attacks" in kwargs):
            kinds = ", ".join(map(_kind, args[1:]))
            raise TypeError(
                f"expected model, data and attacks, and all else by name, got a model and {kinds}: pass images and "
                f"labels as one pair, {function.__name__}(model, (x, y), attacks, eps=...)"
            )
        return function(*args, **kwargs)

    return call


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def _labels(value: Any) -> bool:
    """Whether it is a list of numbers: no sample (x, y), whose image would be a number."""
    return isinstance(value, (tuple, list)) and len(value) > 0 and all(isinstance(v, numbers.Number) for v in value)


def _kind(value: Any) -> str:
    return type(value).__name__
