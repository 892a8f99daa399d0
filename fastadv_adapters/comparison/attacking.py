"""One attack, on the plain model and on fast ones: of torchattacks, of foolbox, a callable, or PGD with ten steps."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attack import SafePGD, ball_around
from ..model import FastAttackModel
from ..options import FastAttackOptions
from .budgets import Budget, is_from, parts_of

Run = Callable[[Tensor, Tensor], Tensor]
"""Images (N, ...) and labels (N,) to adversarial images."""

STEPS = 10
"""Of the attack that is made if none is given."""


class Attacker(ABC):
    """An attack that can be made on the plain model and on fast ones.

    Attributes:
        name: as it is shown.
    """

    name: str

    @abstractmethod
    def on_plain(self, model: nn.Module) -> Run:
        """The attack on the plain model."""

    @abstractmethod
    def on_fast(self, model: nn.Module, options: FastAttackOptions) -> Run:
        """The attack on a fast copy of the model, which is made here."""


def refuse_class(attack: Any, argument: str) -> None:
    """Raise TypeError for a class in the place of an attack; ``argument`` is what errors call it."""
    if isinstance(attack, type):
        name = attack.__name__
        of_foolbox = any(base.__module__.startswith("foolbox.") for base in attack.__mro__)
        made = f"{name}()" if of_foolbox else f"{name}(model, eps=...)"
        raise TypeError(
            f"expected an attack object in {argument}, got the class {name}: make the attack first, {made} say"
        )


def refuse_labels_for_targets(attack: Any, argument: str) -> None:
    """Raise ValueError for an attack of torchattacks to which labels are targets; ``argument`` as above."""
    if any(part.attack_mode == "targeted(label)" for part in parts_of(attack)):
        raise ValueError(
            f"expected an attack in {argument} that takes labels for the true classes, got a {attack.attack} in the "
            f"mode of set_mode_targeted_by_label, whose targets the true labels would be: choose another mode, such as "
            f"set_mode_targeted_random, or pass a callable (model, x, y) that makes targets of y"
        )


def attacker_for(attack: Any, model: nn.Module, budget: Budget) -> Attacker:
    """What makes this attack.

    Raises:
        TypeError: it is none.
        ValueError: a torchattacks attack on another model than the one that is compared.
    """
    if attack is None:
        return _Called(_pgd(budget), f"PGD-{STEPS}")
    if is_from("torchattacks", attack):
        refuse_labels_for_targets(attack, "attack")
        if attack.model is not model:
            raise ValueError(
                f"expected an attack on the plain model that is compared, got {attack.attack} on another "
                f"{type(attack.model).__name__}: make the attack on that model itself"
            )
        return _Torchattacks(attack)
    if is_from("foolbox", attack):
        return _Foolbox(attack, budget)
    if isinstance(attack, SafePGD):
        raise TypeError(
            "expected an attack that takes any model, got a SafePGD, which holds one: pass "
            "lambda model, x, y: SafePGD(model, eps=...)(x, y)"
        )
    if not callable(attack):
        raise TypeError(
            f"expected attack to be of torchattacks or foolbox, or a callable (model, x, y), got "
            f"{type(attack).__name__}: pass one of these, or None for PGD"
        )
    return _Called(attack, getattr(attack, "__name__", type(attack).__name__))


class _Called(Attacker):
    def __init__(self, attack: Callable[[nn.Module, Tensor, Tensor], Tensor], name: str) -> None:
        self._attack, self.name = attack, name

    def on_plain(self, model: nn.Module) -> Run:
        return lambda x, y: self._attack(model, x, y)

    def on_fast(self, model: nn.Module, options: FastAttackOptions) -> Run:
        fast = FastAttackModel(model, **options)
        return lambda x, y: self._attack(fast, x, y)


class _Torchattacks(Attacker):
    def __init__(self, attack: Any) -> None:
        self._attack, self.name = attack, f"torchattacks {attack.attack}"

    def on_plain(self, model: nn.Module) -> Run:
        attack: Run = self._copy()
        return attack

    def on_fast(self, model: nn.Module, options: FastAttackOptions) -> Run:
        from ..torchattacks import accelerate

        attack: Run = accelerate(self._copy(), **options)
        return attack

    def _copy(self) -> Any:
        """Another attack with the same settings on the same models."""
        return copy.deepcopy(self._attack, {id(part.model): part.model for part in parts_of(self._attack)})


class _Foolbox(Attacker):
    def __init__(self, attack: Any, budget: Budget) -> None:
        self._attack, self._budget, self.name = attack, budget, f"foolbox {type(attack).__name__}"

    def on_plain(self, model: nn.Module) -> Run:
        return self._on(model, self._attack)

    def on_fast(self, model: nn.Module, options: FastAttackOptions) -> Run:
        from ..foolbox import accelerate

        return self._on(model, accelerate(self._attack, **options))

    def _on(self, model: nn.Module, attack: Any) -> Run:
        import foolbox

        device = next(model.parameters()).device
        fmodel = foolbox.PyTorchModel(model, self._budget.bounds, device=device)
        return lambda x, y: attack(fmodel, x, y, epsilons=self._budget.eps)[1]


def _pgd(budget: Budget) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Projected gradient descent as everybody writes it (Madry et al. 2018, https://arxiv.org/abs/1706.06083)."""

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        ball = ball_around(budget.norm, x, eps=budget.eps, bounds=budget.bounds)
        found = ball.random_start()
        for _ in range(STEPS):
            leaf = found.to(x.dtype).detach().requires_grad_()
            loss = F.cross_entropy(model(leaf), y, reduction="sum")
            found = ball.step_(found, torch.autograd.grad(loss, leaf)[0], 2.5 * budget.eps / STEPS)
        return ball.finish(found)

    return attack
