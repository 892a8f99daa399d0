"""Containers of classes of their own, as arguments and outputs: they come with their type, items and attributes."""

from collections import OrderedDict, UserList, defaultdict, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

from fastadv_adapters import FastAttackModel

Pair = namedtuple("Pair", "logits number")


class Named(Pair):
    """With a way of its own to be made, which changes what it is given, and attributes."""

    def __new__(cls, logits: Tensor) -> "Named":
        return super().__new__(cls, logits + 1, 7)


class Irreps(tuple[Any, ...]):
    def __new__(cls, first: Tensor, *, second: Tensor) -> "Irreps":
        made = super().__new__(cls, (first, second))
        made.note = "kept"  # type: ignore[attr-defined]
        return made


class Record(list[Any]):
    def __init__(self, name: str, *held: Any) -> None:
        super().__init__(held)
        self.name = name


class Slotted(dict[str, Any]):
    __slots__ = ("note", "tensor", "unset")


class Grouped(defaultdict[str, Any]):
    pass


@dataclass(frozen=True, slots=True)
class Frozen:
    logits: Tensor
    number: int = 3


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """As the library transformers has it: fields that repeat items."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for one in fields(self):
            if getattr(self, one.name) is not None:
                super().__setitem__(one.name, getattr(self, one.name))


class Own(Mapping[str, Any]):
    def __init__(self, **items: Any) -> None:
        self.items_of_it = items

    def __getitem__(self, key: str) -> Any:
        return self.items_of_it[key]

    def __iter__(self) -> Any:
        return iter(self.items_of_it)

    def __len__(self) -> int:
        return len(self.items_of_it)


def with_attributes(made: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "named tuple": lambda t: Pair(t, "s"),
    "derived from one": lambda t: with_attributes(Named(t), note="n", more=[t * 2]),
    "tuple": lambda t: Irreps(t, second=t * 2),
    "tuple in a list": lambda t: [Irreps(t, second=Irreps(t, second=t))],  # type: ignore[arg-type]
    "list": lambda t: Record("n", t, [t * 2], 3),
    "dictionary with slots": lambda t: with_attributes(Slotted(logits=t), note="n", tensor=t * 2),
    "dictionary with a default": lambda t: Grouped(list, a=t, b=[t]),
    "ordered dictionary": lambda t: OrderedDict(b=t, a=t * 2),
    "data class": lambda t: Frozen(t),
    "output of transformers": lambda t: ModelOutput(logits=t, hidden=(t * 2, t)),
    "namespace": lambda t: SimpleNamespace(logits=t, inner={"a": Frozen(t)}),
    "user's list": lambda t: UserList([t, 1]),
    "packed sequence": lambda t: pack_sequence([t[0], t[1]]),
}


def described(value: Any) -> Any:
    """Type, items and attributes at any depth, and tensors by shape, dtype and sum."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, round(float(value.detach().sum()), 3)
    if value is None or isinstance(value, (int, str, type)):
        return value
    items = value.items() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    names = [*getattr(value, "__dict__", ()), "default_factory", "logits", "note", "tensor", "number"]
    held = {name: described(getattr(value, name)) for name in names if hasattr(value, name)}
    return type(value), [described(item) for item in items], held


class Gives(nn.Module):
    """Gives its logits in a form, and takes images in the same one."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        vars(self)["form"] = form

    def forward(self, x: Tensor, other: Any = None) -> Any:
        seen = described(other)
        assert vars(self).setdefault("seen", seen) == seen
        return self.form(self.layer(x))  # type: ignore[operator]


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_containers_come_with_their_type_items_and_attributes(name: str, with_gradient: bool) -> None:
    torch.manual_seed(0)
    model, x = Gives(FORMS[name]).eval(), torch.rand(4, 6)
    fast, leaf = FastAttackModel(model, dtype=torch.float32), x.clone().requires_grad_(with_gradient)
    found, wanted = fast(leaf), model(leaf)
    assert described(found) == described(wanted)
    if with_gradient:
        tensors = [t for t in pytree.tree_leaves(getattr(found, "__dict__", found)) if isinstance(t, Tensor)]
        floating = [t for t in tensors if t.is_floating_point()]
        assert all(t.requires_grad for t in floating)


@pytest.mark.parametrize("name", FORMS)
def test_containers_reach_the_model_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    model, x = Gives(lambda t: t).eval(), torch.rand(4, 6)
    fast = FastAttackModel(model, dtype=torch.float32)
    other = FORMS[name](x)
    model(x, other)  # notes what it sees
    fast(x.clone().requires_grad_(), other)
    assert described(other) == vars(model)["seen"]


HIDING: dict[str, Callable[[Tensor], Any]] = {
    "mapping of one's own": lambda t: Own(logits=t),
    "proxy": lambda t: MappingProxyType({"logits": t}),
    "set": lambda t: frozenset([t]),
    "values": lambda t: {"logits": t}.values(),
}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("name", HIDING)
def test_others_are_an_error(name: str, beside: bool) -> None:
    model = Gives(lambda t: (t, HIDING[name](t)) if beside else HIDING[name](t))
    with pytest.raises(TypeError, match=r"expected an output of tensors, .* got tensors inside a .*: return"):
        FastAttackModel(model)(torch.rand(4, 6, requires_grad=True))
