"""Attributes as they were, to be compared with what they are: containers copied, whatever stands in them."""

from array import array
from collections import deque
from typing import Any

from torch import Tensor

from ..modules import held_in, kind, pointer, put_on


class _Whatever:
    """Equal to anything: stands in a snapshot for what does not matter."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


_WHATEVER = _Whatever()


class _Numbers:
    """An array as it was: equal to one with the same bytes, for NaN is not equal to NaN."""

    def __init__(self, held: "array[Any]") -> None:
        self._held = held.typecode, held.tobytes()

    def __eq__(self, other: object) -> bool:
        other = _Numbers(other) if isinstance(other, array) else other
        return isinstance(other, _Numbers) and self._held == other._held

    __hash__ = None  # type: ignore[assignment]


def snapshot(attributes: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes."""
    # Modes are no change; tensors are compared one by one, by identity, and the dicts that hold them are only to stay.
    return {key: _remembered(key, value) for key, value in attributes.items()}


def _remembered(key: str, value: Any) -> Any:
    if key == "training" or isinstance(value, Tensor):
        return _WHATEVER
    is_looked_at_apart = key in ("_parameters", "_buffers") or (isinstance(value, dict) and not value)
    return value if is_looked_at_apart else _shallow(value)


def _shallow(value: Any, around: tuple[Any, ...] = ()) -> Any:
    """The value with its containers copied, so that a change inside them shows in a comparison.

    One that holds itself is equal to whatever stands there then, for a comparison would have no end either.
    """
    if any(value is one for one in around):
        return _WHATEVER
    around = (*around, value)
    if isinstance(value, dict):
        return {key: _shallow(item, around) for key, item in value.items()}
    if isinstance(value, list):
        return [_shallow(item, around) for item in value]
    if isinstance(value, tuple):
        return tuple(_shallow(item, around) for item in value)
    if isinstance(value, deque):
        return deque((_shallow(item, around) for item in value), value.maxlen)
    if isinstance(value, array):
        return _Numbers(value)
    if isinstance(value, bytearray):
        return value[:]
    return set(value) if isinstance(value, set) else value


def seen_on(tensor: Tensor) -> tuple[Any, ...]:
    """What has been put on a tensor, and the tensors in it by identity, place and version."""
    values = put_on(tensor)
    held = [_mark(v) if isinstance(v, Tensor) else freeze(vars(v)) for v in held_in(values.values())]
    return {k: _shallow(v) for k, v in values.items() if not isinstance(v, Tensor)}, held


def _mark(tensor: Tensor) -> tuple[object, ...]:
    return id(tensor), not tensor.is_inference() and tensor._version, pointer(tensor), kind(tensor)


def freeze(attributes: dict[str, Any]) -> dict[str, Any]:
    """Those of another object."""
    return {key: _shallow(value) for key, value in attributes.items()}
