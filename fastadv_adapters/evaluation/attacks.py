"""What users may ask for: presets, names, and attacks that exist already."""

import re
from dataclasses import replace
from typing import Any

from ..attack import SafePGD, asked_of
from ..comparison import is_from, refuse_class, refuse_labels_for_targets
from .libraries import Foolbox, Function, Torchattack
from .rows import CLEAN
from .safe import Safe
from .stages import Attack
from .standard import NAMES, RANDOM, STANDARD, Reference

PRESETS: dict[str, tuple[str, ...]] = {
    "quick": ("safe-pgd-auto-20",),
    "strong": ("safe-pgd-ce-100x2", "safe-pgd-margin-100x2", "safe-pgd-targeted-100"),
    "standard": STANDARD,
}
"""Names of attacks, in the order in which they are run: each gets what stood up to those before."""

_SAFE = re.compile(r"safe-pgd(?:-(?P<loss>auto|ce|margin|dlr|targeted))?(?:-(?P<steps>\d+))?(?:x(?P<restarts>\d+))?")
_KNOWN = (
    f"a preset ({', '.join(PRESETS)}), safe-pgd[-LOSS][-STEPS][xSTARTS] (LOSS auto, ce, margin or dlr), "
    f"safe-pgd-targeted[-STEPS] or one of AutoAttack's {', '.join(NAMES)}"
)


def attacks_of(given: Any, *, random: bool) -> list[Attack]:
    """The attacks of a preset, a name, an attack or a list of them, each under a name of its own.

    ``random`` says whether the model draws random numbers.
    """
    wanted = list(given) if isinstance(given, (list, tuple)) else [given]
    if not wanted:
        raise ValueError(f"expected at least one attack in attacks, got none: name {_KNOWN}")
    attacks: list[Attack] = []
    for one in wanted:
        for attack in _named(one, random=random) if isinstance(one, str) else [_existing(one)]:
            attacks.append(_renamed(attack, {CLEAN, *(a.name for a in attacks)}))
    return attacks


def _named(name: str, *, random: bool) -> list[Attack]:
    if name in PRESETS:
        names = RANDOM if random and name == "standard" else PRESETS[name]
        return [attack for part in names for attack in _named(part, random=random)]
    if name in NAMES:
        return [Reference(name, name)]
    found = _SAFE.fullmatch(name)
    if found is None or (found["loss"] == "targeted" and found["restarts"]):
        raise ValueError(f"expected attacks to name {_KNOWN}, got {name!r}: choose one of these")
    loss, targeted = found["loss"] or "auto", found["loss"] == "targeted"
    settings: dict[str, Any] = {"steps": int(found["steps"] or 50), "restarts": int(found["restarts"] or 1)}
    settings["loss"] = "margin" if targeted else loss
    return [Safe(name, settings, targeted)]


def _existing(attack: Any) -> Attack:
    if isinstance(attack, SafePGD):
        if attack.targeted:
            raise ValueError(
                "expected an untargeted SafePGD in attacks, got one with targeted=True, whose labels would be targets: "
                'name "safe-pgd-targeted", which raises the likeliest classes one after the other'
            )
        if attack.classes is False or attack.before is not None:
            what = "classes=False" if attack.classes is False else "an attribute before"
            raise ValueError(
                f"expected SafePGD of images and class labels in attacks, got one with {what}: pass a callable "
                f"(model, x, y) that runs it"
            )
        settings = {name: getattr(attack, name) for name in ("alpha", "steps", "random_start", "restarts")}
        return Safe(
            "SafePGD",
            {**settings, "loss": asked_of(attack.loss)},
            given=(attack.eps, attack.norm, attack.bounds),
            made_of=attack.model.wrapped,
        )
    refuse_class(attack, "attacks")
    kind = type(attack)
    if is_from("torchattacks", attack):
        refuse_labels_for_targets(attack, "attacks")
        return Torchattack(kind.__name__, attack)
    if is_from("foolbox", attack):
        return Foolbox(kind.__name__, attack)
    if callable(attack):
        return Function(getattr(attack, "__name__", kind.__name__), attack)
    raise TypeError(
        f"expected attacks to hold names, attacks of torchattacks or foolbox, or callables, got {kind.__name__}: name "
        f"{_KNOWN}"
    )


def _renamed(attack: Attack, taken: set[str]) -> Attack:
    """The attack under a name that no other has."""
    name, number = attack.name, 2
    while name in taken:
        name, number = f"{attack.name} ({number})", number + 1
    return replace(attack, name=name)
