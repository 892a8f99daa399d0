"""What the package asks for in its signatures: no parameter is private, and options are told in types once."""

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastadv_adapters
from fastadv_adapters import FastAttackModel, FastAttackOptions, SafePGD, autoattack, foolbox, torchattacks
from tests.support.torchvision import hide_if_broken

Signed = Callable[..., Any]


def modules() -> Iterator[str]:
    """The package and everything in it."""
    hide_if_broken()
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


def keyword_only(found: Signed) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(found).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def test_the_options_as_a_type_are_those_of_the_model() -> None:
    taken = keyword_only(FastAttackModel)
    assert len(taken) >= 8, "the search should find the options"
    assert typing.get_type_hints(FastAttackOptions) == {name: p.annotation for name, p in taken.items()}
    assert FastAttackOptions.__required_keys__ == frozenset()
    assert [name for name, p in taken.items() if p.default is inspect.Parameter.empty] == []


def test_options_are_described_where_the_model_is_and_nowhere_else() -> None:
    options, model = FastAttackOptions.__annotations__, inspect.getdoc(FastAttackModel)
    assert [name for name in options if f"\n    {name}: " not in (model or "")] == []
    for handed_on in (FastAttackOptions, torchattacks.accelerate, autoattack.accelerate, foolbox.FastPyTorchModel):
        text = inspect.getdoc(handed_on) or ""
        assert [name for name in options if f"\n    {name}: " in text] == []
        assert "fastadv_adapters.FastAttackModel" in text


@pytest.mark.parametrize("hands_on", [torchattacks.accelerate, autoattack.accelerate, foolbox.FastPyTorchModel])
def test_adapters_hand_on_options_of_that_type(hands_on: Signed) -> None:
    assert inspect.signature(hands_on).parameters["options"].annotation == "Unpack[FastAttackOptions]"


def test_both_forms_of_the_attack_take_the_same_settings() -> None:
    core, adapter = inspect.signature(SafePGD).parameters, inspect.signature(torchattacks.SafePGD).parameters
    own = {"targeted", "bounds"}  # torchattacks has modes and images in [0, 1]
    assert core.keys() - adapter.keys() == own
    assert {name: p.annotation for name, p in core.items() if name not in own} == {
        name: p.annotation for name, p in adapter.items()
    }
