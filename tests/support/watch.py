"""The watch over wrapped models: whatever a test does with them, no call of the package may change one."""

import ctypes
import functools
import itertools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters.boundary.function import Boundary
from fastadv_adapters.model import FastAttackModel

_CALLS = ("forward", "update", "view", "summary", "train", "_apply", "requires_grad_", "zero_grad", "__reduce__")

_EACH, _SELDOM = 12, 17
"""So many calls of a kind are all looked at in a test; of later ones, the steps of attacks, one in so many."""

_READ = 2**14
"""Tensors with more entries are watched by version counter and address alone, so that it costs little."""


class Watch:
    """Looks at a wrapped model before and after each call of the package that could reach it.

    Attributes:
        looks: how many calls were looked at.
        changed: what was found, in words.
    """

    def __init__(self) -> None:
        self.looks = 0
        self.changed: list[str] = []

    def begin(self, patch: pytest.MonkeyPatch) -> None:
        """Stand between the tests and the package."""
        patch.setattr(FastAttackModel, "__init__", self._around(FastAttackModel.__init__, lambda fast, model: model))
        for name in _CALLS:
            call = getattr(FastAttackModel, name)
            call = _from_its_own_caller(call) if name == "train" else call
            patch.setattr(FastAttackModel, name, self._around(call, lambda fast, *args: fast.wrapped))
        make = FastAttackModel._call

        def remember(fast: FastAttackModel, *args: Any, **rest: Any) -> Any:
            call = make(fast, *args, **rest)
            vars(call)["watched"] = fast.wrapped
            return call

        patch.setattr(FastAttackModel, "_call", _of_the_package(remember))
        backward = self._around(Boundary.backward, lambda ctx, *grads: vars(ctx.call).get("watched"))
        patch.setattr(Boundary, "backward", staticmethod(backward))

    def _around(self, call: Callable[..., Any], model_of: Callable[..., Any]) -> Callable[..., Any]:
        numbers = itertools.count()

        @functools.wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            number = next(numbers)
            if number >= _EACH and number % _SELDOM:
                return call(*args, **kwargs)
            model = model_of(*args)
            before = seen(model)
            try:
                return call(*args, **kwargs)
            finally:
                self.looks += 1
                if seen(model) != before:
                    self.changed.append(f"{call.__qualname__} changed a {type(model).__name__}")

        return _of_the_package(watched)


def _of_the_package(function: Any) -> Callable[..., Any]:
    """The function as if it stood in the package: warnings pass over it when they look for the user's line."""
    names = {**function.__globals__, "__name__": "fastadv_adapters.watched"}
    found = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    return functools.update_wrapper(found, function)


def _from_its_own_caller(train: Callable[..., Any]) -> Callable[..., Any]:
    """`train` as if nothing stood in between: it looks at the module that calls it, here two frames up."""

    @functools.wraps(train)
    def called(*args: Any, **kwargs: Any) -> Any:
        return FunctionType(_pass_on.__code__, sys._getframe(2).f_globals)(train, args, kwargs)

    return called


def _pass_on(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call(*args, **kwargs)


def seen(model: object) -> list[Any]:
    """All of a model that a call might change."""
    if not isinstance(model, nn.Module):
        return []
    # Not by its named_modules(), which a class may have of its own, nor by ours, whose lines some tests count.
    found, stack = dict[int, tuple[str, nn.Module]](), [("", model)]
    while stack:
        name, part = stack.pop()
        if id(part) not in found:
            found[id(part)] = name, part
            stack += [(f"{name}.{key}", own) for key, own in part._modules.items() if own is not None]
    return [(name, *_of_module(part)) for name, part in found.values()]


def _of_module(part: nn.Module) -> tuple[Any, ...]:
    parameters = [(key, _of_tensor(p), p is not None and _of_tensor(p.grad)) for key, p in part._parameters.items()]
    buffers = [(key, _of_tensor(b)) for key, b in part._buffers.items()]
    hooks = [(key, tuple(value)) for key, value in vars(part).items() if key.endswith("_hooks")]
    plain = {key: value for key, value in vars(part).items() if isinstance(value, (int, float, str, bool, type(None)))}
    others = {key: _of_value(value) for key, value in vars(part).items() if key not in plain}
    return type(part), parameters, buffers, hooks, plain, others


def _of_value(value: object) -> Any:
    return _of_tensor(value) if isinstance(value, Tensor) else id(value)


def _of_tensor(tensor: Tensor | None) -> Any:
    if tensor is None or nn.parameter.is_lazy(tensor):
        return id(tensor)
    address = tensor.data_ptr() if tensor.layout == torch.strided and tensor.device.type != "meta" else 0
    version = None if tensor.is_inference() else tensor._version
    held = _bytes_at(address, tensor) if address and tensor.device.type == "cpu" else b""
    return id(tensor), version, address, held, tensor.dtype, tensor.device, tensor.shape, tensor.requires_grad


def _bytes_at(address: int, tensor: Tensor) -> bytes:
    """What a small tensor holds, read past PyTorch, so that a test that counts operators does not count these."""
    span = entries = tensor.numel()
    if entries and not tensor.is_contiguous():
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return ctypes.string_at(address, span * tensor.itemsize) if entries > 0 and span <= _READ else b""
