"""The attacks that are compared, by name."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from math import inf
from pathlib import Path
from typing import Any

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


def _adv_lib(loss: str) -> Callable[[nn.Module, Task], Attack]:
    def make(model: nn.Module, task: Task) -> Attack:
        norm = {"linf": inf, "l2": 2, "l1": 1}[task.norm]
        settings = {"eps": task.eps, "norm": norm, "n_iter": task.steps, "loss_function": loss}
        # In L1 its authors let the ball shrink, https://arxiv.org/abs/2103.01208, section 3.2.
        return lambda x, y: _auto_pgd().apgd(model, x, y, use_large_reps=task.norm == "l1", **settings)

    return make


def _auto_pgd() -> Any:
    """The module of adv-lib's APGD, by its file: the package around it wants torchvision and visdom."""
    if "auto_pgd" not in sys.modules:
        package = importlib.util.find_spec("adv_lib")
        if package is None or package.origin is None:
            raise ModuleNotFoundError("expected adv-lib: pip install --no-deps adv-lib")
        loader = SourceFileLoader("auto_pgd", str(Path(package.origin).with_name("attacks") / "auto_pgd.py"))
        spec = importlib.util.spec_from_loader("auto_pgd", loader)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        loader.exec_module(module)
        sys.modules["auto_pgd"] = module
    return sys.modules["auto_pgd"]


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
    Way("adv-lib APGD-CE", _adv_lib("ce"), theirs=True),
    Way("adv-lib APGD-DLR", _adv_lib("dlr"), theirs=True),
)
"""All ways. adv-lib is no part of the tests' environment, and is left out where it is missing."""


def ways_here() -> tuple[Way, ...]:
    """Those that can be run here."""
    missing = importlib.util.find_spec("adv_lib") is None
    return tuple(way for way in WAYS if not (missing and way.name.startswith("adv-lib")))
