"""The budget that an attack of the user's brings along, and what is said if another one is asked for."""

import math
import numbers
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from ..attack import Norm, accept_bounds, accept_norm, accept_size

EPS = 8 / 255
"""The budget of attacks that take any, if none is given."""

MARGIN = 1e-5
"""A change may be longer than eps by this share of it, for attacks of other libraries round otherwise."""

ROUNDING = 1e-6
"""It may be longer by this share of the bounds too, for images round as well, whatever eps is."""

_NORMS: dict[object, Norm] = {"linf": "linf", "l2": "l2", "l1": "l1", math.inf: "linf", 2: "l2", 1: "l1"}


_MINIMISERS: dict[str, Norm] = {"CW": "l2", "DeepFool": "l2", "EADL1": "l1"}
"""Attacks of torchattacks without an eps. (The others minimise the number of pixels, a mix of norms, or nothing.)"""


@dataclass(frozen=True)
class Budget:
    """How far an attack may go.

    Attributes:
        eps: in units of the images.
        norm: of eps.
        bounds: the least and the largest value of an image.
        stated: whether eps is that of the attack: it was given, or the attack says so or takes any.
    """

    eps: float
    norm: Norm
    bounds: tuple[float, float]
    stated: bool = True

    def record(self) -> dict[str, Any]:
        """What a comparison reports of it."""
        return {"eps": self.eps if self.stated else None, "norm": self.norm, "bounds": list(self.bounds)}


@dataclass(frozen=True)
class Own:
    """What an attack says of its own budget; None where it says nothing.

    Attributes:
        eps: a number that it was made with.
        norm: in which it measures.
    """

    eps: float | None = None
    norm: Norm | None = None


def own_budget(attack: Any) -> Own:
    """The budget of an attack object, or of a callable with an attribute ``eps`` or a ``partial`` that sets it.

    A default value ``eps`` of a function is none: that of an optimiser, say, has this name too.
    """
    _, *inside = parts = parts_of(attack)
    if is_from("torchattacks", attack) and any(one.normalization_used is not None for one in parts):
        return Own()  # of normalised images, for which its eps is in other units
    if inside and not hasattr(attack, "eps"):  # a MultiAttack
        first, *others = {own_budget(one) for one in inside}
        return Own() if others else first
    if is_from("foolbox", attack):  # which gets eps when it is called
        return Own(norm=_norm_of_foolbox(attack))
    names = ("eps", "max_epsilon") if is_from("torchattacks", attack) else ("eps",)
    given = attack.keywords.get("eps") if isinstance(attack, partial) else None
    found = next((getattr(attack, name) for name in names if hasattr(attack, name)), given)
    eps = float(found) if not isinstance(found, bool) and isinstance(found, numbers.Real) else None
    return Own(eps, _said(attack) or (_minimised(attack) if eps is None else _norm_of(attack)))


def is_from(library: str, attack: Any) -> bool:
    """Whether this is an attack object of torchattacks or foolbox."""
    return any(b.__name__ == "Attack" and b.__module__.split(".")[0] == library for b in type(attack).__mro__)


def parts_of(attack: Any) -> list[Any]:
    """An attack of torchattacks and all attacks inside it, each once; any other attack alone."""
    if not is_from("torchattacks", attack):
        return [attack]
    from ..torchattacks import attacks_in

    return list(attacks_in(attack))


def budget_for(attack: Any, eps: float | None, norm: Norm | None, bounds: tuple[float, float]) -> Budget:
    """The budget that an attack has in a comparison; None stands for an attack that takes any, or for its own.

    Raises:
        TypeError, ValueError: they are no budget, or not the attack's.
    """
    own = own_budget(attack)
    if eps is not None:
        eps = accept_size("eps", eps)
        if own.eps is not None and not _same(own.eps, eps):
            _refuse("eps", f"{own.eps:g}", f"{eps:g}")
    if norm is not None and own.norm not in (None, accept_norm(norm)):
        _refuse("norm", repr(own.norm), repr(norm))
    length = own.eps if eps is None else eps
    stated = length is not None or attack is None or is_from("foolbox", attack)
    length = accept_size("eps", EPS if length is None else length)
    return Budget(length, accept_norm(norm or own.norm or "linf"), accept_bounds(bounds), stated)


def doubt_own(name: str, own: Own, budgets: Sequence[float], norm: Norm) -> list[str]:
    """Notes if an attack does not have the budget of an evaluation, which has these ``budgets`` in this norm."""
    if own.norm not in (None, norm):
        return [
            f"the attack {name} measures in {own.norm}, and the evaluation in {norm}: these are different budgets. "
            f"Take an attack in {norm}, or evaluate with norm={own.norm!r}"
        ]
    if own.eps is None:
        return []
    length, remedy = own.eps, "Make it with the same eps" + (", in a call for each" if len(budgets) > 1 else "")
    others = [eps for eps in budgets if not _same(length, eps)]
    ways = {
        "it is weaker than that budget allows": [eps for eps in others if eps > length],
        "what it finds beyond that does not count": [eps for eps in others if eps < length],
    }
    return [
        f"the attack {name} has eps {length:g} of its own, and the evaluation eps {', '.join(f'{e:g}' for e in some)}: "
        f"{what}. {remedy}"
        for what, some in ways.items()
        if some
    ]


def reach(eps: float, bounds: tuple[float, float]) -> float:
    """How long a change may measure that is within eps, up to rounding."""
    return eps * (1 + MARGIN) + ROUNDING * extent(bounds)


def extent(bounds: tuple[float, ...]) -> float:
    """From the lower to the upper bound; 0 if there is no end, and shares of it say nothing."""
    apart = bounds[1] - bounds[0]
    return apart if math.isfinite(apart) else 0.0


def _same(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=MARGIN)


def _refuse(name: str, own: str, given: str) -> NoReturn:
    raise ValueError(
        f"expected {name} to be that of the attack, {own}, got {given}: leave {name} out, or make the attack with "
        f"{given}"
    )


def _said(attack: Any) -> Norm | None:
    """What an attack says itself."""
    said = getattr(attack, "norm", None)
    if isinstance(said, bool) or not isinstance(said, (str, int, float)):
        return None
    return _NORMS.get(said.lower() if isinstance(said, str) else said)


def _norm_of(attack: Any) -> Norm | None:
    """The norm of an attack that has an eps: torchattacks' own are in L-infinity, or named after L2."""
    if hasattr(attack, "norm") or not type(attack).__module__.startswith("torchattacks."):
        return None
    return "l2" if "L2" in type(attack).__name__ else "linf"


def _minimised(attack: Any) -> Norm | None:
    """That in which an attack of torchattacks without an eps looks for a small change; subclasses count."""
    kinds = [kind for kind in type(attack).__mro__ if kind.__module__.startswith("torchattacks.")]
    return next((_MINIMISERS[kind.__name__] for kind in kinds if kind.__name__ in _MINIMISERS), None)


def _norm_of_foolbox(attack: Any) -> Norm | None:
    with suppress(ValueError):  # of attacks that are to be told
        return _NORMS.get(getattr(getattr(attack, "distance", None), "p", None))
    return None
