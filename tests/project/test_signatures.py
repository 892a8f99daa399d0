"""What the package asks for in its signatures: no parameter is private, and options are told in types once."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import fastadv_adapters

Signed = Callable[..., Any]


def modules() -> Iterator[str]:
    """The package and everything in it."""
    yield fastadv_adapters.__name__
    for module in pkgutil.walk_packages(fastadv_adapters.__path__, f"{fastadv_adapters.__name__}."):
        yield module.name


def signed(name: str) -> Iterator[tuple[str, Signed]]:
    """The functions and classes that a module defines, and the methods of these classes; private ones are left out."""
    for public, value in public_of(importlib.import_module(name)):
        if getattr(value, "__module__", None) != name or not callable(value):
            continue
        yield f"{name}.{public}", value
        if inspect.isclass(value):
            called = {"__call__": vars(value).get("__call__")}
            for method, function in [*public_of(value), *called.items()]:
                if method in vars(value) and inspect.isroutine(function):
                    yield f"{name}.{public}.{method}", function


def public_of(owner: object) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in inspect.getmembers(owner) if not name.startswith("_")]


def private_parameters(found: Signed) -> list[str]:
    try:
        parameters = inspect.signature(found).parameters
    except ValueError:  # a type without a signature, Literal[...] say
        return []
    return [parameter for parameter in parameters if parameter.startswith("_")]


def test_no_public_signature_has_a_private_parameter() -> None:
    found = {path: private_parameters(value) for name in modules() for path, value in signed(name)}
    assert {
        "fastadv_adapters.model.FastAttackModel",
        "fastadv_adapters.model.FastAttackModel.view",
        "fastadv_adapters.attack.safe_pgd.SafePGD.__call__",
        "fastadv_adapters.torchattacks.accelerate",
    } <= found.keys(), "the search should find what is public"
    assert {path: names for path, names in found.items() if names} == {}


def test_a_private_parameter_is_found() -> None:
    def function(x: int, *, _before: int = 0) -> int:
        return x + _before

    class Kept:
        def __init__(self, _x: int) -> None:
            self.x = _x

    assert private_parameters(function) == ["_before"]
    assert private_parameters(Kept) == ["_x"]
