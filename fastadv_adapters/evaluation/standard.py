"""The attacks of AutoAttack as its authors set them, from ``pyautoattack``, each on the view that suits it.

Croce and Hein 2020, https://arxiv.org/abs/2003.01690.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import autoattack
from ..modules import need
from .seeds import seed_of
from .stages import Attack, BatchStage, Setting, Stage

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The version "standard", in its order."""

RANDOM = ("apgd-ce", "apgd-dlr")
"""The version "rand", for models that draw random numbers: gradients are averaged over 20 passes."""

NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")

_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
_TARGETS = 4
"""The least number of classes that the targeted attacks know how to handle."""


@dataclass(frozen=True)
class Reference(Attack):
    """One attack of AutoAttack, under the name that it has there.

    Attributes:
        key: that name.
    """

    libraries = ("pyautoattack",)
    key: str

    @property
    def description(self) -> str:
        """The name that AutoAttack gives it; its version says the rest."""
        return f"AutoAttack {self.key}"

    def stage(self, setting: Setting, eps: float) -> Stage:
        """The attack with this budget and AutoAttack's own settings."""
        if self.key == "square" and len(setting.shape) != 3:
            raise ValueError(
                f"expected images of shape (C, H, W) for square of AutoAttack, got {setting.shape}: name the other "
                f"attacks, apgd-ce and apgd-t say, or take the preset strong"
            )
        if setting.bounds != (0.0, 1.0):
            raise ValueError(
                f"expected bounds (0, 1) for {self.key} of AutoAttack, got {setting.bounds}: scale the images, and "
                f"normalise them inside the model"
            )
        if self.key in ("apgd-t", "fab-t", "apgd-dlr") and setting.classes < _TARGETS:
            raise ValueError(
                f"expected at least {_TARGETS} classes for {self.key} of AutoAttack, got {setting.classes}: name the "
                f"attacks apgd-ce, fab and square, or take the preset strong"
            )
        attack = _attack(self.key, setting, eps)

        def run(x: Tensor, y: Tensor) -> Tensor:
            attack.seed = int(torch.initial_seed() % 2**31)  # the evaluation has set it, sample by sample
            whole = x.to(torch.float32)  # FAB and Square compute in it, and put results into tensors of x's dtype
            found: Tensor = attack.perturb(whole, y)
            return (x + (found - whole).to(x.dtype)).clamp(*setting.bounds) if x.dtype == torch.float64 else found

        return BatchStage(self.name, eps, setting, run, True)


def _attack(name: str, setting: Setting, eps: float) -> Any:
    """The attack as AutoAttack's standard version holds it ("rand" for random models), on its view."""
    version = "rand" if setting.random else "standard"
    library = need("pyautoattack", extra="autoattack", otherwise='attacks="quick"')
    adversary = library.AutoAttack(
        setting.fast,
        norm=_NORMS[setting.norm],
        eps=eps,
        seed=seed_of(setting.seed, name) % 2**31,
        version=version,
        device=str(setting.judge.device),
    )
    part = {"apgd-ce": "apgd", "apgd-dlr": "apgd", "apgd-t": "apgd_targeted", "square": "square"}.get(name, "fab")
    attack = getattr(adversary, part)
    if part == "apgd":
        attack.loss = name.removeprefix("apgd-")
    if part == "fab":
        attack.targeted = name == "fab-t"
    if hasattr(attack, "n_target_classes"):
        attack.n_target_classes = min(attack.n_target_classes, setting.classes - 1)
    setattr(attack, autoattack.ATTACKS[part], autoattack.view_for(part, setting.shared, setting.options))
    return attack
