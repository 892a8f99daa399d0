"""The attacks that are compared, by name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchattacks
from torch import Tensor, nn

from benchmarks.attack.budgets import NORMS, Norm
from fastadv_adapters import FastAttackModel, SafePGD

Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """What an attack is asked for."""

    norm: Norm
    eps: float
    steps: int
    seed: int


@dataclass(frozen=True)
class Way:
    """One way to attack.

    Attributes:
        name: in tables and files.
        make: the attack on a model.
        norms: those that it knows.
        ours: whether it is SafePGD with its default loss, which is compared with the best of the others.
        theirs: whether it is another library's: if there is one, other losses of SafePGD are no rivals.
    """

    name: str
    make: Callable[[nn.Module, Task], Attack]
    norms: tuple[Norm, ...] = NORMS
    ours: bool = False
    theirs: bool = False


def _safe(dtype: torch.dtype, loss: str) -> Callable[[nn.Module, Task], Attack]:
    def make(model: nn.Module, task: Task) -> Attack:
        fast = FastAttackModel(model, dtype=dtype)
        generator = torch.Generator().manual_seed(task.seed)
        return SafePGD(
            fast,
            eps=task.eps,
            norm=task.norm,
            steps=task.steps,
            loss=loss,  # type: ignore[arg-type]
            early_stop=True,
            generator=generator,
        )

    return make


def _apgd(loss: str) -> Callable[[nn.Module, Task], Attack]:
    def make(model: nn.Module, task: Task) -> Attack:
        norm = {"linf": "Linf", "l2": "L2"}[task.norm]
        attack: Attack = torchattacks.APGD(model, norm=norm, eps=task.eps, steps=task.steps, seed=task.seed, loss=loss)
        return attack

    return make


def _pgd(model: nn.Module, task: Task) -> Attack:
    kind = torchattacks.PGD if task.norm == "linf" else torchattacks.PGDL2
    torch.manual_seed(task.seed)
    attack: Attack = kind(model, eps=task.eps, alpha=2.5 * task.eps / task.steps, steps=task.steps)
    return attack


WAYS = (
    Way("SafePGD float32", _safe(torch.float32, "auto"), ours=True),
    Way("SafePGD bfloat16", _safe(torch.bfloat16, "auto"), ours=True),
    Way("SafePGD ce", _safe(torch.float32, "ce")),
    Way("SafePGD margin", _safe(torch.float32, "margin")),
    Way("APGD-CE", _apgd("ce"), ("linf", "l2"), theirs=True),
    Way("APGD-DLR", _apgd("dlr"), ("linf", "l2"), theirs=True),
    Way("PGD", _pgd, ("linf", "l2"), theirs=True),
)
"""All ways. In L1 torchattacks has no attack with a budget: there the other losses of SafePGD are the rivals."""
