"""What an attack is to an evaluation: samples go in, and come out with a candidate."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attack import Norm
from ..comparison import Own
from ..model import FastAttackModel
from ..options import FastAttackOptions
from .confirming import Judge
from .rows import Case
from .seeds import seed_of, seeded


@dataclass(frozen=True)
class Setting:
    """What all attacks of an evaluation share.

    Attributes:
        model: the plain model.
        fast: the fast one.
        classes: how many the model knows.
        shape: of one image.
        random: whether the model draws random numbers.
        options: that were given for the fast model; they win over what suits an attack.
    """

    model: nn.Module
    fast: FastAttackModel
    judge: Judge
    norm: Norm
    bounds: tuple[float, float]
    batch_size: int
    seed: int
    classes: int
    shape: tuple[int, ...]
    random: bool
    options: FastAttackOptions

    @property
    def shared(self) -> FastAttackModel:
        """The fast model for attacks of libraries: with logits in float32, which all take, unless others were given."""
        return self.fast if "logits_dtype" in self.options else self.fast.view(logits_dtype=torch.float32)


@dataclass
class Stage(ABC):
    """One attack with one budget.

    Attributes:
        name: of the attack.
        eps: the budget.
        setting: of the evaluation.
    """

    name: str
    eps: float
    setting: Setting

    @abstractmethod
    def run(self, source: Iterator[Case]) -> Iterator[tuple[Case, Tensor, bool]]:
        """Each sample, a candidate for it, and whether the attack claims that it is adversarial."""


@dataclass(frozen=True)
class Attack(ABC):
    """An attack that was asked for.

    Attributes:
        name: unique in the evaluation.
        libraries: distributions whose versions belong to the number.
    """

    name: str

    libraries: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def description(self) -> str:
        """Its settings, which an evaluation that goes on has to share."""

    @property
    def own(self) -> Own:
        """What it says of a budget of its own."""
        return Own()

    def transferred_from(self, model: nn.Module) -> str:
        """The models that it attacks in the place of this one, for the description."""
        return ""

    def doubt(self, model: nn.Module) -> str | None:
        """What is seldom meant about it, on this model."""
        return None

    @abstractmethod
    def stage(self, setting: Setting, eps: float) -> Stage:
        """The attack with this budget."""


@contextmanager
def _counted(fast: FastAttackModel) -> Iterator[list[int]]:
    """The rows of all forward and of all backward passes through any view of a fast model, known afterwards."""
    passes, before = [0, 0], fast.gradient_stats.samples

    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        passes[0] += next((len(t) for t in inputs if isinstance(t, Tensor)), 0)

    with fast.register_forward_pre_hook(count):  # which all views share
        yield passes
    passes[1] = fast.gradient_stats.samples - before


@dataclass
class BatchStage(Stage):
    """An attack that takes batches.

    Its random numbers depend on the seed, its name and the first sample of each batch; so its candidates may depend on
    the batch.

    Attributes:
        attack: images (N, ...) and labels (N,) to candidates of the same shape.
        counted: whether it runs on views of the fast model, so that passes can be counted.
    """

    attack: Callable[[Tensor, Tensor], Tensor]
    counted: bool

    def run(self, source: Iterator[Case]) -> Iterator[tuple[Case, Tensor, bool]]:
        """Fill batches one after the other; the last may be smaller."""
        while cases := list(islice(source, self.setting.batch_size)):
            yield from zip(cases, *self._attacked(cases), strict=True)

    def _attacked(self, cases: list[Case]) -> tuple[Tensor, list[bool]]:
        begun, device = time.perf_counter(), self.setting.judge.device
        x = torch.stack([case.x for case in cases])
        y = torch.tensor([case.label for case in cases], device=device)
        networks = self.setting.fast._networks
        found, failed = None, -1
        with _counted(self.setting.fast) as passes:
            while failed < networks.failed:  # an attack may remember what it saw before an audit failed
                failed = networks.failed
                with seeded(seed_of(self.setting.seed, self.name, cases[0].index), device):
                    found = self.attack(x.clone(), y.clone())  # it may write into them
        if not isinstance(found, Tensor) or found.shape != x.shape:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"expected the attack {self.name} to return images of shape {tuple(x.shape)}, got {got}: return one "
                f"candidate per image"
            )
        candidates = found.detach().to(x.device, x.dtype)
        forward, backward = (rows / len(cases) if self.counted else None for rows in passes)
        seconds = (time.perf_counter() - begun) / len(cases)
        for case in cases:
            case.add(forward, backward, seconds)
        with seeded(seed_of(self.setting.seed, self.name, cases[0].index, "claimed"), device):
            return candidates, self._claimed(x, y, candidates)

    def _claimed(self, x: Tensor, y: Tensor, candidates: Tensor) -> list[bool]:
        """Which candidates are not the image itself, and adversarial as the fast network sees them."""
        changed = (candidates != x).flatten(1).any(1)
        with torch.no_grad():
            seen = self.setting.fast.view(decisions="fast")(candidates).argmax(1) != y
        return (changed & seen).tolist()  # type: ignore[no-any-return]
