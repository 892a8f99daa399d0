"""Attacks of other libraries and callables in an evaluation, each on the view of the fast model that suits it."""

import inspect
import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..comparison import Own, copy_of, is_from, own_budget, parts_of
from ..model import FastAttackModel
from .describing import arguments_of, code_of, described
from .identity import are_one, model_hash, unwrapped
from .stages import Attack, BatchStage, Setting, Stage

_PASSING = re.compile(r" at 0x[0-9a-f]+|\bdevice=[^,)]*, |, \w+=tensor\(.*?\)(?=, \w+=|\)$)", re.DOTALL)
"""What an attack of torchattacks prints of itself that is no setting: where it is, and arrays that settings make."""

_MODELS = ("model", "net", "network", "f")
"""Names of a first parameter that is a model."""


@dataclass(frozen=True)
class Given(Attack):
    """An attack that exists already, with a budget of its own, if it has one.

    Attributes:
        attack: as it was given.
    """

    attack: Any

    @property
    def own(self) -> Own:
        """What the attack says."""
        return own_budget(self.attack)


@dataclass(frozen=True)
class Torchattack(Given):
    """An attack of torchattacks; it is copied, and the copy runs on the fast model where it would on the plain one.

    (Other models in it, whose adversarials are to be transferred, stay; and so does LGV's own copy, which it trains.)
    """

    libraries = ("torchattacks",)

    @property
    def description(self) -> str:
        """The class and its settings, as torchattacks prints them, and the normalisation that it takes off."""
        normal = self.attack.normalization_used or {}
        taken = "".join(f", {name}={value.flatten().tolist()}" for name, value in sorted(normal.items()))
        return f"torchattacks {_PASSING.sub('', repr(self.attack))}{taken}{code_of(type(self.attack))}"

    def transferred_from(self, model: nn.Module) -> str:
        """The other models in it, but for that of LGV, which is trained on the way."""
        others = [part.model for part in parts_of(self.attack) if not _copies(part)]
        plain = [other.wrapped if isinstance(other, FastAttackModel) else other for other in others]
        return "".join(f" of the model {model_hash(unwrapped(one))}" for one in plain if not are_one(one, model))

    def doubt(self, model: nn.Module) -> str | None:
        """Whether it was made of another model."""
        if any(are_one(part.model, model) or _copies(part) for part in parts_of(self.attack)):
            return None
        return (
            f"{self.name} was made of another model, a {type(self.attack.model).__name__}: it attacks that, and its "
            f"images are transferred to this one. To attack this one, make it of this one"
        )

    def stage(self, setting: Setting, eps: float) -> Stage:
        """The attack, whatever its budget is: a candidate outside of the evaluation's is no success."""
        from ..torchattacks import view_for

        attack, shared = copy_of(self.attack), setting.shared
        parts = parts_of(attack)
        for part in parts:  # one fast copy serves all
            if unwrapped(part.model) is unwrapped(setting.model):
                part.model = view_for(part, shared, setting.options)
        networks = setting.fast._networks
        counted = all(isinstance(part.model, FastAttackModel) and part.model._networks is networks for part in parts)
        return BatchStage(self.name, eps, setting, attack, counted)


def _copies(attack: Any) -> bool:
    """Whether an attack makes a copy of its model for itself: LGV, which trains that."""
    return any(kind.__name__ == "LGV" for kind in type(attack).__mro__)


@dataclass(frozen=True)
class Foolbox(Given):
    """An attack of foolbox, which says its norm."""

    libraries = ("foolbox",)

    @property
    def description(self) -> str:
        """The class and its attributes."""
        return f"foolbox {_of_foolbox(self.attack)}{code_of(type(self.attack))}"

    def stage(self, setting: Setting, eps: float) -> Stage:
        """The attack with this budget."""
        from ..foolbox import FastPyTorchModel, suits

        view = setting.fast.view(**suits(type(_innermost(self.attack)), setting.judge.device, setting.options))
        model = FastPyTorchModel(view, setting.bounds)
        return BatchStage(self.name, eps, setting, lambda x, y: self.attack(model, x, y, epsilons=[eps])[1][0], True)


@dataclass(frozen=True)
class Function(Given):
    """A callable ``(model, x, y) -> candidates``, which is given the fast model, or ``(x, y) -> candidates``."""

    @property
    def description(self) -> str:
        """Where it is defined, its eps if it has one or a default value of that name, and its code."""
        text = described(self.attack)
        found: Any = self.own.eps
        if found is None:
            found = getattr(arguments_of(self.attack).get("eps"), "default", None)
        if "eps=" not in text and isinstance(found, numbers.Real):
            text += f"(eps={float(found):.6g})"
        return text + code_of(self.attack)

    def stage(self, setting: Setting, eps: float) -> Stage:
        """The callable, whatever its budget is: a candidate outside of the evaluation's is no success."""
        if not _takes_model(self.attack):
            return BatchStage(self.name, eps, setting, self.attack, False)
        return BatchStage(self.name, eps, setting, partial(self.attack, setting.fast), True)


def _takes_model(function: Callable[..., Any]) -> bool:
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


def _innermost(attack: Any) -> Any:
    """The attack that one of foolbox repeats, or itself."""
    return _innermost(attack.attack) if type(attack).__name__ == "Repeated" else attack


def _of_foolbox(attack: Any) -> str:
    """The class of an attack and its attributes; other attacks are among them."""
    plain = (int, float, str, bool, tuple, type(None), torch.dtype)
    given = [f"{k}={v!r}" for k, v in vars(attack).items() if isinstance(v, plain)]
    given += [f"{k}={_of_foolbox(v)}" for k, v in vars(attack).items() if is_from("foolbox", v)]
    return f"{type(attack).__name__}({', '.join(given)})"
