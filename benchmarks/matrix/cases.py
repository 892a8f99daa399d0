"""What is run of each attack, as data: a row per attack, a case per way of calling it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Library = Literal["torchattacks", "foolbox"]
Norm = Literal["linf", "l2", "l1", "l0"]
Rule = Literal["gradient", "minimum-norm", "black-box"]
"""How plain and fast are compared; `benchmarks.matrix.verdicts` says how."""

Targeted = Literal["no", "label", "function", "least-likely", "criterion"]
"""How an attack is told its targets: torchattacks' three modes that fit, or foolbox's criterion."""


LOOKS = (range(3), range(9))
"""The random seeds of a second look, and of a third."""


@dataclass(frozen=True)
class Eps:
    """A setting that grows with the network's budget: `times` as much of it, in the norm of the case."""

    times: float = 1.0


@dataclass(frozen=True)
class Case:
    """One way of calling one attack.

    Attributes:
        rule: how results are compared.
        norm: what distances are measured in.
        settings: arguments of the attack's class; an `Eps` is replaced by a number for each network.
        budget: the largest perturbation, in multiples of the network's budget; None for attacks that seek the least.
        label: tells the cases of an attack apart.
        targeted: whether and how the attack is told targets.
        options: of `FastAttackModel`; what `accelerate` does not choose by itself.
        full_precision: attack a view with gradients in full precision.
        start: hand the attack starting points: training images of another class, or of the target.
        model: `"binarised"` puts a threshold before the network, for the attack that is made for that.
    """

    rule: Rule
    norm: Norm
    settings: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    label: str = ""
    targeted: Targeted = "no"
    options: Mapping[str, Any] = field(default_factory=dict)
    full_precision: bool = False
    start: bool = False
    model: Literal["plain", "binarised"] = "plain"

    def but(self, **changes: Any) -> "Case":
        """The same with some attributes changed; `settings` are added to those that are there."""
        settings = {**self.settings, **changes.pop("settings", {})}
        return replace(self, settings=settings, **changes)


@dataclass(frozen=True)
class Row:
    """One attack and the cases it is run in.

    Attributes:
        library: where it comes from.
        attack: its name there.
        cases: the ways it is called in.
        note: what a user has to know, beyond what the results say.
    """

    library: Library
    attack: str
    cases: tuple[Case, ...]
    note: str = ""


def sized(settings: Mapping[str, Any], size: float) -> dict[str, Any]:
    """The settings with numbers for every `Eps`, where the network's budget is `size`."""
    return {name: value.times * size if isinstance(value, Eps) else value for name, value in settings.items()}


def scaled(case: Case, times: float) -> Case:
    """The case with a budget, and all that goes with it, `times` as large."""
    larger = {k: Eps(v.times * times) if isinstance(v, Eps) else v for k, v in case.settings.items()}
    return replace(case, settings=larger, budget=None if case.budget is None else case.budget * times)
