"""The loop of ``SafePGD``: iterates, candidates, and who is left."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import FastAttackModel
from .balls import Ball
from .looking import Looking, Settings
from .pool import Best, Pool
from .resting import Resting
from .steps import rows_for
from .targets import Targets

BESIDE = 1e-3
"""The standard deviation of a start beside a sample, as a share of the range between the bounds, as in TRADES (Zhang et
al. 2019, arXiv:1901.08573); but at most a tenth of eps."""


@dataclass
class Search(Looking):
    """One attack on one batch: the loop, with the fast network and then, for some samples, in full precision.

    Nothing here waits for the device but :meth:`run`, once at its end, and with ``early_stop`` each look.

    Attributes:
        found: the best candidates of the whole batch, as exact decisions judge them.
    """

    ball: Ball
    targets: Targets
    seeds: list[int]
    found: Best

    def run(self, network: FastAttackModel, index: Tensor) -> Tensor:
        """Attack the samples at ``index``; returns which of them need an attack in full precision."""
        pool = self._pool(index)
        if self.settings.start != "origin":  # otherwise the first iterate is the sample itself
            pool, _ = self._look(network, pool)
        for seed in self.seeds:
            if len(pool.index):
                pool.x = self._start(seed, pool)
                pool = self._restart(network, pool)
        return self._settle(pool) if len(pool.index) else pool.index

    def _size(self, network: FastAttackModel, samples: int) -> int:
        """How many rows the network is given for so many samples: few different numbers where each costs."""
        costs = self.settings.shapes_cost and network is self.settings.fast
        return rows_for(samples, len(self.ball.origin)) if costs else samples

    def _pool(self, index: Tensor) -> Pool:
        x = self.ball.origin
        spoilt = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        whole = torch.arange(len(x), device=x.device)
        pool = Pool(whole, self.targets, self.ball, self.ball.start(), Best.none(x.clone()), spoilt)
        return pool if len(index) == len(x) else pool.take(index)

    def _start(self, seed: int, pool: Pool) -> Tensor:
        """Iterates to begin with. They are drawn for the whole batch, so a sample's does not depend on who is left."""
        if self.settings.start == "origin":
            return pool.ball.start()
        x = start_at(self.settings, self.ball, seed)
        return x if len(pool.index) == len(x) else x.index_select(0, pool.index)

    def _restart(self, network: FastAttackModel, pool: Pool) -> Pool:
        """All steps from one start; returns the samples that are left."""
        sizes = self.settings.step_sizes
        resting = Resting(network, self.ball, self.targets, allowed=self.settings.stops_cycles)
        inside = True
        for step, (size, radius) in enumerate(zip(sizes, self.settings.radii, strict=True)):
            pool, gradient = self._look(network, pool, progress=step / max(1, len(sizes) - 1), inside=inside)
            if len(pool.index) == 0:
                return resting.join(pool)
            pool.ball.times(radius).step_(pool.x, gradient, radius * size)
            inside = radius == 1
            pool = resting.rest(pool)
            if len(pool.index) == 0:
                return resting.join(pool)
        return resting.join(self._look(network, pool)[0])

    def _look(
        self, network: FastAttackModel, pool: Pool, progress: float | None = None, *, inside: bool = True
    ) -> tuple[Pool, Tensor]:
        """Offer the iterates as candidates; returns who is left and the gradient of their loss.

        Args:
            network: what is attacked.
            pool: the samples.
            progress: the share of the steps that is done, 0 to 1; None if no gradient is wanted.
            inside: whether the iterates are within eps; if not, they are no candidates.
        """
        ascend = progress is not None
        seen = self._see(network, pool, ascend=ascend)
        values, directions = self._rate(seen, progress)
        places = None
        if inside:
            adversarial = self._offer(seen, pool, values)
            places = self._confirm(pool, seen.x, adversarial) if self.settings.early_stop else None
        left = pool if places is None else pool.take(places)
        if not ascend or len(left.index) == 0:
            return left, left.x
        if places is None:
            return pool, self._gradient(seen, directions, pool)
        if 3 * self._size(network, len(places)) < 2 * seen.rows.size:
            # Forward again for those who are left costs less than backward for everyone.
            del seen  # and what it keeps for a backward pass
            seen = self._see(network, left, ascend=True)
            directions = [None if d is None else seen.rows.spread(d.index_select(0, places)) for d in directions]
            return left, self._gradient(seen, directions, left)
        gradient = self._gradient(seen, directions, pool).index_select(0, places)
        left.spoilt.copy_(pool.spoilt.index_select(0, places))
        return left, gradient

    def _confirm(self, pool: Pool, x: Tensor, adversarial: Tensor) -> Tensor | None:
        """Keep what exact decisions confirm; returns the places of the samples that are left, None for all."""
        nominated = adversarial.nonzero().squeeze(1)
        if len(nominated) == 0:
            return None
        confirmed = self._judge(pool.index.index_select(0, nominated), x.index_select(0, nominated))
        left = torch.ones_like(adversarial).index_put_((nominated,), ~confirmed).nonzero().squeeze(1)
        return left if len(left) < len(x) else None

    def _settle(self, pool: Pool) -> Tensor:
        """Judge the best candidates exactly; returns the samples that were spoilt or wrongly held adversarial."""
        confirmed = self._judge(pool.index, pool.best.x)
        return pool.index[pool.spoilt | (pool.best.adversarial & ~confirmed)]

    def _judge(self, index: Tensor, x: Tensor) -> Tensor:
        """Offer candidates as they would be returned, on exact logits; returns which are adversarial.

        Args:
            index: their places in the caller's batch, each once, in rising order.
            x: the candidates.
        """
        whole = len(index) == len(self.ball.origin)
        ball, targets = (self.ball, self.targets) if whole else (self.ball.take(index), self.targets.take(index))
        best = self.found if whole else self.found.take(index)
        adversarial, _ = self._judged(ball, targets, best, x)
        if not whole:
            self.found.put(index, best)
        return adversarial


def start_at(settings: Settings, ball: Ball, seed: int) -> Tensor:
    """Iterates at a random point of each ball, or beside each sample."""
    given = settings.generator
    generator = torch.Generator(given.device if given else ball.origin.device).manual_seed(seed)
    return ball.random_start(generator) if settings.start == "random" else beside(ball, generator)


def beside(ball: Ball, generator: torch.Generator) -> Tensor:
    """An iterate a little beside each sample, drawn on the generator's device."""
    noise = torch.randn(ball.origin.shape, generator=generator, device=generator.device, dtype=ball.working)
    size = min(BESIDE * (ball.upper - ball.lower), ball.eps / 10)
    return ball.project_(ball.start().add_(noise.to(ball.origin.device), alpha=size))
