"""Samples that are left out until the next start, and what has to hold for that."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..model import FastAttackModel
from ..modules import generator_states, holds_generator
from .balls import Ball
from .cycles import Past
from .pool import Best, Pool
from .targets import Targets


class Footing:
    """What the gradient of a sample depends on beside its iterate, as far as that can change during a restart.

    Args:
        network: is asked for gradients.
        device: of the samples.
    """

    def __init__(self, network: FastAttackModel, device: torch.device) -> None:
        self._network, self._device = network, device
        self._random = generator_states(device)
        self._own_random: bool | None = None
        self._marks: Any = None

    def begin(self) -> None:
        """From here on nothing random may be drawn."""
        self._random = generator_states(self._device)

    def moved(self) -> bool:
        """Whether weights, precision or the scale of half precision have changed since this was last asked.

        Waits for the device if the network computes in float16.
        """
        before, self._marks = self._marks, self._network._networks.marks()
        return bool(before != self._marks)

    def bears(self) -> bool:
        """Whether samples are known not to see each other, and nothing random was drawn since the restart began."""
        scaled_together = self._network._given["loss_scale"] == "per-call"
        if scaled_together or not self._network._networks.known_apart():
            return False
        if self._own_random is None:
            self._own_random = holds_generator(self._network.wrapped)
        return not self._own_random and generator_states(self._device) == self._random


class Resting:
    """Samples of one restart whose iterates are in a cycle: they have no new candidate, and need no more passes.

    Args:
        network: is asked for gradients.
        ball: of the whole batch.
        targets: of the whole batch.
        allowed: whether samples may rest at all.
    """

    def __init__(self, network: FastAttackModel, ball: Ball, targets: Targets, *, allowed: bool) -> None:
        self._ball, self._targets = ball, targets
        self._footing = Footing(network, ball.origin.device) if allowed else None
        self._parts: list[Pool] = []

    def rest(self, pool: Pool) -> Pool:
        """After a step: the samples that go on. Waits for the device if samples may rest.

        If what a gradient depends on has moved, all go on, and iterates before that are forgotten.
        """
        if self._footing is None:
            return pool
        if self._footing.moved() or pool.past is None:
            pool = self.join(pool)
            pool.past = Past.beginning(pool.x)
            return pool
        cycling = pool.past.returned(pool.x)
        tired = cycling.nonzero().squeeze(1)
        if len(tired) == 0:
            return pool
        if not self._footing.bears():
            self._footing = pool.past = None
            return self.join(pool)
        self._parts.append(pool.take(tired))
        return pool.take(cycling.logical_not().nonzero().squeeze(1))

    def join(self, pool: Pool) -> Pool:
        """Those who went on and those who rested, in the batch's order."""
        if not self._parts:
            return pool
        parts, self._parts = [*self._parts, pool], []
        order = torch.cat([part.index for part in parts]).argsort()

        def joined(values: list[Tensor]) -> Tensor:
            return torch.cat(values).index_select(0, order)

        index, x, spoilt = (joined([getattr(part, name) for part in parts]) for name in ("index", "x", "spoilt"))
        best = Best(*(joined([getattr(part.best, f.name) for part in parts]) for f in fields(Best)))
        return Pool(index, self._targets.take(index), self._ball.take(index), x, best, spoilt)
