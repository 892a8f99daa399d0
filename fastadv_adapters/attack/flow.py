"""Samples that pass through ``SafePGD`` one by one: each with its own step, start and counts."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .balls import Norm
from .pool import Best, Pool


@dataclass(frozen=True)
class Entrants:
    """Samples that come in.

    Attributes:
        index: who they are, (N,), int64.
        x: (N, ...).
        y: their labels, (N,), int64.
        rivals: classes to be raised, one per start, (N, R), int64; R is 0 if the loss chooses.
    """

    index: Tensor
    x: Tensor
    y: Tensor
    rivals: Tensor


@dataclass(frozen=True)
class Departed:
    """Samples that go out, in the order in which they stood.

    Attributes:
        index: who they are.
        x: the best candidate of each, as the exact view of the model judges them, (N, ...).
        claimed: whether that view holds it adversarial, (N,).
        forwards: forward passes per sample, (N,).
        backwards: likewise.
        seconds: the share of the time that each has taken, (N,), float64.
    """

    index: list[int]
    x: Tensor
    claimed: Tensor
    forwards: Tensor
    backwards: Tensor
    seconds: Tensor


@dataclass(frozen=True)
class Streaming:
    """How a stream runs, beside what the attack does at each sample.

    Attributes:
        norm: of the ball.
        eps: its radius.
        bounds: the least and the largest value of an input.
        starts: how often each sample starts.
        capacity: how many samples are under attack at once, at least :data:`~fastadv_adapters.attack.steps.LEAST_ROWS`.
        seed_of: a sample's index and the number of its start to the seed of that start.
        clearance: by how much, relative to the largest logit, exact logits have to be adversarial for a sample to leave
            early. One nearer to the border goes on: a higher loss may carry it further.
        passes: over how many passes gradients are averaged, for models that draw random numbers.
    """

    norm: Norm
    eps: float
    bounds: tuple[float, float]
    starts: int
    capacity: int
    seed_of: Callable[[int, int], int]
    clearance: float = 0.0
    passes: int = 1


@dataclass
class Flow:
    """The samples that are under attack at the moment.

    Attributes:
        pool: their iterates and nominated candidates.
        found: the best candidates as exact decisions judge them.
        step: how many steps each has made since its start.
        start: which start it is at.
        forwards: forward passes that each has been part of.
        backwards: likewise.
        seconds: time, likewise.
    """

    pool: Pool
    found: Best
    step: Tensor
    start: Tensor
    forwards: Tensor
    backwards: Tensor
    seconds: Tensor

    def __len__(self) -> int:
        return len(self.step)

    @classmethod
    def of(cls, pool: Pool, x: Tensor) -> "Flow":
        """Samples that have done nothing yet."""
        step, start, forwards, backwards = torch.zeros(4, len(x), dtype=torch.int64, device=x.device).unbind()
        seconds = torch.zeros(len(x), dtype=torch.float64, device="cpu")
        return cls(pool, Best.none(x.clone()), step, start, forwards, backwards, seconds)

    def take(self, index: Tensor) -> "Flow":
        """Those at ``index``."""
        parts = [getattr(self, f.name) for f in fields(self)[2:]]
        taken = [part.index_select(0, index.to(part.device)) for part in parts]
        return Flow(self.pool.take(index), self.found.take(index), *taken)

    def join(self, other: "Flow") -> "Flow":
        """These and then others."""
        joined = [torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)[2:]]
        return Flow(self.pool.join(other.pool), self.found.join(other.found), *joined)

    def departed(self) -> Departed:
        """What is known of them when they go."""
        counts = self.forwards.cpu(), self.backwards.cpu(), self.seconds
        return Departed(self.pool.index.tolist(), self.found.x, self.found.adversarial, *counts)
