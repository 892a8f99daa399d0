"""How a case becomes adversarial images, on the plain model and on a fast one."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import foolbox as fb
import torch
import torchattacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.matrix.cases import Case, Row, sized
from benchmarks.matrix.subjects import CLASSES, Subject
from fastadv_adapters import FastAttackModel
from fastadv_adapters.foolbox import FastPyTorchModel
from fastadv_adapters.torchattacks import accelerate


@dataclass(frozen=True)
class Attacked:
    """What came out of one attack.

    Attributes:
        images: as the attack gave them back.
        seconds: of the attack alone.
        gradients: samples in backward passes, those with a zero gradient, those with a non-finite one.
        chosen: the options that the attack's models had, in words; empty for the plain model.
    """

    images: Tensor
    seconds: float
    gradients: tuple[int, int, int]
    chosen: str = ""


class Watched(nn.Module):
    """A plain model that counts the gradients at its input, and changes none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.samples = self.zero = self.nonfinite = 0

    def forward(self, x: Tensor) -> Tensor:
        """What the model gives."""
        if torch.is_grad_enabled() and x.requires_grad:
            x = x.view_as(x)
            x.register_hook(self._count)
        logits: Tensor = self.model(x)
        return logits

    def _count(self, gradient: Tensor) -> None:
        rows = gradient.flatten(1)
        self.samples += len(rows)
        self.zero += int((rows == 0).all(dim=1).sum())
        self.nonfinite += int((~rows.isfinite()).any(dim=1).sum())


def targets_of(labels: Tensor) -> Tensor:
    """The classes that targeted attacks shall reach."""
    return (labels + 1) % CLASSES


def attack(
    row: Row, case: Case, model: nn.Module, subject: Subject, x: Tensor, y: Tensor, dtype: torch.dtype | None
) -> Attacked:
    """Attack images `x` of labels `y`: the plain model where `dtype` is None, else a fast one of that dtype."""
    run = _torchattacks if row.library == "torchattacks" else _foolbox
    return run(row.attack, case, model, subject, x, y, dtype)


def _torchattacks(
    name: str, case: Case, model: nn.Module, subject: Subject, x: Tensor, y: Tensor, dtype: torch.dtype | None
) -> Attacked:
    victim = Watched(model).eval() if dtype is None else model
    made = _MADE.get(name, _one)(name, victim, sized(case.settings, subject.budgets[case.norm]), subject)
    _aim(made, case)
    if hasattr(made, "seed"):  # APGD, FAB and Square set the generator back to it: else their starts never change
        made.seed = torch.initial_seed()
    if dtype is not None:
        accelerate(made, dtype=dtype, **case.options)
        if case.full_precision:
            made.model = made.model.view(full_precision=True)
    labels = targets_of(y) if case.targeted == "label" else y
    _warm_up(_victims(made), x)
    start = time.perf_counter()
    images = made(x, labels)
    seconds = time.perf_counter() - start
    victims = _victims(made)
    return Attacked(images.detach(), seconds, _gradients(victims), _chosen(victims))


def _one(name: str, model: nn.Module, settings: dict[str, Any], subject: Subject) -> Any:
    return getattr(torchattacks, name)(model, **settings)


def _multi(name: str, model: nn.Module, settings: dict[str, Any], subject: Subject) -> Any:
    attacks = [torchattacks.PGD(model, **settings), torchattacks.MIFGSM(model, **settings)]
    return torchattacks.MultiAttack([*attacks, torchattacks.APGD(model, eps=settings["eps"], steps=settings["steps"])])


def _lgv(name: str, model: nn.Module, settings: dict[str, Any], subject: Subject) -> Any:
    data = TensorDataset(subject.data.train_images, subject.data.train_labels)
    loader = DataLoader(data, batch_size=128, shuffle=True)
    return torchattacks.LGV(model, loader, epochs=1, nb_models_epoch=3, verbose=False, **settings)


def _auto(name: str, model: nn.Module, settings: dict[str, Any], subject: Subject) -> Any:
    """AutoAttack with as few queries in its last part as told: 5000 on each image are too many here."""
    queries = settings.pop("n_queries")
    made = torchattacks.AutoAttack(model, **settings)
    made._autoattack.attacks[-1].n_queries = queries
    return made


_MADE: dict[str, Callable[[str, nn.Module, dict[str, Any], Subject], Any]] = {
    "MultiAttack": _multi,
    "LGV": _lgv,
    "AutoAttack": _auto,
}
"""The attacks that are made of more than a model and settings."""


def _aim(made: Any, case: Case) -> None:
    if case.targeted == "label":
        made.set_mode_targeted_by_label(quiet=True)
    elif case.targeted == "function":
        made.set_mode_targeted_by_function(lambda images, labels: targets_of(labels), quiet=True)
    elif case.targeted == "least-likely":
        made.set_mode_targeted_least_likely(quiet=True)


def _victims(made: Any) -> list[nn.Module]:
    """The models that a torchattacks attack and all attacks inside it ask, each view once."""
    found = {id(part.model): part.model for part in (made, *made._attacks.values())}
    if isinstance(made, torchattacks.LGV):
        return list(made.base_attack.model.models) if made.base_attack else []
    return list(found.values())


def _foolbox(
    name: str, case: Case, model: nn.Module, subject: Subject, x: Tensor, y: Tensor, dtype: torch.dtype | None
) -> Attacked:
    fmodel: Any
    if dtype is None:
        victim: nn.Module = Watched(model).eval()
        fmodel = fb.PyTorchModel(victim, bounds=(0.0, 1.0))
    else:
        fmodel = FastPyTorchModel(model, bounds=(0.0, 1.0), dtype=dtype, **case.options)
        fmodel = fmodel.in_full_precision() if case.full_precision else fmodel
        victim = fmodel.fast
    made = getattr(fb.attacks, name)(**case.settings)
    if name == "DatasetAttack":
        made.feed(fmodel, x)
    aimed = case.targeted == "criterion"
    criterion = fb.criteria.TargetedMisclassification(targets_of(y)) if aimed else fb.criteria.Misclassification(y)
    start_at = {"starting_points": subject.starting_points(model, targets_of(y))} if case.start else {}
    epsilon = None if case.budget is None else case.budget * subject.budgets[case.norm]
    _warm_up([victim], x)
    start = time.perf_counter()
    images = made(fmodel, x, criterion, epsilons=epsilon, **start_at)[1]
    seconds = time.perf_counter() - start
    return Attacked(images.detach(), seconds, _gradients([victim]), _chosen([victim]))


@functools.cache
def compile_solver(name: str) -> None:
    """Run a Brendel & Bethge attack once on next to nothing: numba compiles its solver, which takes up to a minute."""
    if name.endswith("BrendelBethgeAttack"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
        nn.init.eye_(net[1].weight)  # type: ignore[arg-type]
        x = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        made = getattr(fb.attacks, name)(steps=1)
        starting_points = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
        made(fb.PyTorchModel(net, (0.0, 1.0)), x, torch.tensor([0]), epsilons=None, starting_points=starting_points)


def _warm_up(victims: list[nn.Module], x: Tensor) -> None:
    """One gradient of two images, uncounted: the fast model checks itself at the first."""
    for victim in victims:
        if isinstance(victim, FastAttackModel):
            leaf = x[:2].clone().requires_grad_()
            logits = victim(leaf)
            if logits.requires_grad:  # behind a threshold nothing does
                torch.autograd.grad(logits.sum(), leaf)
            victim.reset_gradient_stats()


def _gradients(victims: list[nn.Module]) -> tuple[int, int, int]:
    """Samples, zero and non-finite ones over all models; views of one fast model share their counts."""
    stats: dict[int, tuple[int, int, int]] = {}
    for victim in victims:
        if isinstance(victim, FastAttackModel):
            found = victim.gradient_stats
            stats[id(victim.wrapped)] = (found.samples, found.zero, found.nonfinite)
        else:
            plain = cast(Watched, victim)
            stats[id(plain)] = (plain.samples, plain.zero, plain.nonfinite)
    samples, zero, nonfinite = (sum(column) for column in zip(*stats.values(), strict=True)) if stats else (0, 0, 0)
    return samples, zero, nonfinite


def _chosen(victims: list[nn.Module]) -> str:
    """The options that differ between views, in words."""
    fast = [victim for victim in victims if isinstance(victim, FastAttackModel)]
    words = {
        f"{victim._decisions} decisions, {str(victim._logits_dtype).removeprefix('torch.')} logits" for victim in fast
    }
    return "; ".join(sorted(words))
