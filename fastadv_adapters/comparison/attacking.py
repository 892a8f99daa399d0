"""One attack, on the plain model and on fast ones: of torchattacks, of foolbox, a callable, or PGD with ten steps."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attack import SafePGD, ball_around
from ..model import FastAttackModel
from ..modules import parameters_of
from ..options import FastAttackOptions
from .budgets import Budget, is_from, parts_of

Run = Callable[[Tensor, Tensor], Tensor]
"""Images (N, ...) and labels (N,) to adversarial images."""

STEPS = 10
"""The attack that is made if none is given has so many steps."""


@dataclass(frozen=True)
class Attacker:
    """An attack that can be made on the plain model and on fast ones.

    Attributes:
        name: as it is shown.
        on_plain: makes it on the plain model.
        on_fast: makes it on a fast copy of the model, which it makes too.
    """

    name: str
    on_plain: Callable[[nn.Module], Run]
    on_fast: Callable[[nn.Module, FastAttackOptions], Run]


def copy_of(attack: Any) -> Any:
    """An attack of torchattacks like this one, all attacks inside it copied too, on the same models."""
    models = [getattr(part, "model", None) for part in parts_of(attack)]
    return copy.deepcopy(attack, {id(model): model for model in models if model is not None})


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
    """What makes this attack; TypeError if it is none, ValueError if it is one on another model."""
    if attack is None:
        return _called(_pgd(budget), f"PGD-{STEPS}")
    if is_from("torchattacks", attack):
        refuse_labels_for_targets(attack, "attack")
        if attack.model is not model:
            raise ValueError(
                f"expected an attack on the plain model that is compared, got {attack.attack} on another "
                f"{type(attack.model).__name__}: make the attack on that model itself"
            )
        return _of_torchattacks(attack)
    if is_from("foolbox", attack):
        return _of_foolbox(attack, budget)
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
    return _called(attack, getattr(attack, "__name__", type(attack).__name__))


def _called(attack: Callable[[nn.Module, Tensor, Tensor], Tensor], name: str) -> Attacker:
    def on(model: nn.Module) -> Run:
        return lambda x, y: attack(model, x, y)

    return Attacker(name, on, lambda model, options: on(FastAttackModel(model, **options)))


def _of_torchattacks(attack: Any) -> Attacker:
    from ..torchattacks import accelerate

    return Attacker(
        f"torchattacks {attack.attack}",
        lambda model: copy_of(attack),
        lambda model, options: accelerate(copy_of(attack), **options),
    )


def _of_foolbox(attack: Any, budget: Budget) -> Attacker:
    import foolbox

    from ..foolbox import accelerate

    def on(model: nn.Module, attack: Any) -> Run:
        fmodel = foolbox.PyTorchModel(model, budget.bounds, device=next(parameters_of(model)).device)
        return lambda x, y: attack(fmodel, x, y, epsilons=budget.eps)[1]

    return Attacker(
        f"foolbox {type(attack).__name__}",
        lambda model: on(model, attack),
        lambda model, options: on(model, accelerate(attack, **options)),
    )


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
