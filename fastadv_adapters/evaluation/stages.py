"""What an attack is to an evaluation: samples go in, and come out with a candidate."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..attack import Norm
from ..comparison import Own
from ..model import FastAttackModel
from ..options import FastAttackOptions
from .confirming import Judge
from .counting import Counter
from .rows import Case
from .seeds import seed_of, seeded


@dataclass(frozen=True)
class Setting:
    """What all attacks of an evaluation share.

    Attributes:
        model: the plain model.
        fast: the fast one.
        judge: the plain model as judge.
        norm: of the budget.
        bounds: the least and the largest value of an input.
        batch_size: how many samples are attacked at once.
        seed: of all random numbers.
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


class Stage(Protocol):
    """One attack with one budget.

    Attributes:
        name: of the attack.
        eps: the budget.
    """

    name: str
    eps: float

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

    def named(self, name: str) -> "Attack":
        """The same under another name."""
        return replace(self, name=name)


class Batched(Protocol):
    """Attacks a batch of images (N, ...) with labels (N,)."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Candidates of the same shape."""


@dataclass
class BatchStage:
    """An attack that takes batches.

    Its random numbers depend on the seed, its name and the first sample of each batch; so its candidates may depend on
    the batch.

    Attributes:
        name: of the attack.
        eps: the budget.
        setting: of the evaluation.
        attack: what attacks a batch.
        counted: whether it runs on views of the fast model, so that passes can be counted.
    """

    name: str
    eps: float
    setting: Setting
    attack: Batched
    counted: bool

    def run(self, source: Iterator[Case]) -> Iterator[tuple[Case, Tensor, bool]]:
        """Fill batches one after the other; the last may be smaller."""
        while cases := list(islice(source, self.setting.batch_size)):
            yield from zip(cases, *self._attacked(cases), strict=True)

    def _attacked(self, cases: list[Case]) -> tuple[Tensor, list[bool]]:
        begun, device = time.perf_counter(), self.setting.judge.device
        x = torch.stack([case.x for case in cases])
        y = torch.tensor([case.label for case in cases], device=device)
        counter = Counter(self.setting.fast)
        found, failed = None, -1
        while failed < self.setting.fast._networks.failed:  # an attack may remember what it saw before an audit failed
            failed = self.setting.fast._networks.failed
            with seeded(seed_of(self.setting.seed, self.name, cases[0].index), device), counter:
                found = self.attack(x.clone(), y.clone())  # it may write into them
        if not isinstance(found, Tensor) or found.shape != x.shape:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"expected the attack {self.name} to return images of shape {tuple(x.shape)}, got {got}: return one "
                f"candidate per image"
            )
        candidates = found.detach().to(x.device, x.dtype)
        count = len(cases)
        forward, backward = (passes / count if self.counted else None for passes in (counter.forward, counter.backward))
        seconds = (time.perf_counter() - begun) / count
        for case in cases:
            case.add(forward, backward, seconds)
        with seeded(seed_of(self.setting.seed, self.name, cases[0].index, "claimed"), device):
            return candidates, self._claimed(x, y, candidates)

    def _claimed(self, x: Tensor, y: Tensor, candidates: Tensor) -> list[bool]:
        """Which candidates are not the image itself, and adversarial as the fast network sees them."""
        changed = (candidates != x).flatten(1).any(1)
        with torch.no_grad():
            seen = self.setting.fast.view(decisions="fast")(candidates).argmax(1) != y
        claimed: list[bool] = (changed & seen).tolist()
        return claimed
