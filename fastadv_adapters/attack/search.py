"""The loop of ``SafePGD``: iterates, candidates, and who is left."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..boundary import Packed, Watch, watch_gradients
from ..model import FastAttackModel
from .balls import Ball
from .objectives import Objective
from .pool import Best, Pool, Rows
from .resting import Resting
from .steps import rows_for
from .targets import Targets

Start = Literal["random", "beside", "origin"]

BESIDE = 1e-3
"""The standard deviation of a start beside a sample, as a share of the range between the bounds, as in TRADES (Zhang et
al. 2019, arXiv:1901.08573); but at most a tenth of eps."""


@dataclass(frozen=True)
class Settings:
    """What an attack does, settled before it meets a batch.

    Attributes:
        fast: gives logits and gradients.
        exact: gives the logits that count.
        before: a differentiable function between x and the model, or None.
        step_sizes: one per step.
        radii: of the ball after each step, as a multiple of eps; what is outside of eps is no candidate.
        start: where each restart begins: at a "random" point of the ball, "beside" the sample, or at it ("origin").
        generator: says on which device starts are drawn; None for the CPU.
        early_stop: whether confirmed samples are dropped.
        stops_cycles: whether samples whose iterates are in a cycle are left out until the next start.
        shapes_cost: whether every new batch size costs the fast model time.
    """

    fast: FastAttackModel
    exact: FastAttackModel
    before: Callable[[Tensor], Tensor] | None
    step_sizes: tuple[float, ...]
    radii: tuple[float, ...]
    start: Start
    generator: torch.Generator | None
    early_stop: bool
    stops_cycles: bool
    shapes_cost: bool


class Seen(NamedTuple):
    """A forward pass.

    Attributes:
        x: what was asked about, (N, ...), without history.
        rows: how x stands in the batch that the network was given.
        leaf: that batch.
        outputs: of the leaf, with history if a gradient is wanted.
        watch: tells which of its gradients were broken.
    """

    x: Tensor
    rows: Rows
    leaf: Tensor
    outputs: Packed
    watch: Watch


@dataclass
class Search:
    """One attack on one batch: the loop, with the fast network and then, for some samples, in full precision.

    Nothing here waits for the device but :meth:`run`, once at its end, and with ``early_stop`` each look.

    Attributes:
        found: the best candidates of the whole batch, as exact decisions judge them.
    """

    settings: Settings
    objective: Objective
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

    def _pool(self, index: Tensor) -> Pool:
        x = self.ball.origin
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        whole = torch.arange(len(x), device=x.device)
        pool = Pool(whole, self.targets, self.ball, self.ball.start(), Best.none(x.clone()), broken)
        return pool if len(index) == len(x) else pool.take(index)

    def _start(self, seed: int, pool: Pool) -> Tensor:
        """Iterates to begin with. They are drawn for the whole batch, so a sample's does not depend on who is left."""
        if self.settings.start == "origin":
            return pool.ball.start()
        given = self.settings.generator
        generator = torch.Generator(given.device if given else pool.x.device).manual_seed(seed)
        x = self.ball.random_start(generator) if self.settings.start == "random" else beside(self.ball, generator)
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
        left.broken.copy_(pool.broken.index_select(0, places))
        return left, gradient

    def _see(self, network: FastAttackModel, pool: Pool, *, ascend: bool) -> Seen:
        """Show the network the iterates, as a leaf of a graph that is gone before a step writes into them."""
        x = pool.x.to(self.ball.origin.dtype)  # what the model sees: iterates in x's dtype
        rows = pool.rows(self._size(network, len(x)))
        leaf = rows.spread(x).detach().requires_grad_(ascend)
        with torch.set_grad_enabled(ascend), watch_gradients() as watch:
            outputs = self._outputs(network, leaf)
        return Seen(x, rows, leaf, outputs, watch)

    def _size(self, network: FastAttackModel, samples: int) -> int:
        """How many rows the network is given for so many samples: few different numbers where each costs."""
        costs = self.settings.shapes_cost and network is self.settings.fast
        return rows_for(samples, len(self.ball.origin)) if costs else samples

    def _rate(self, seen: Seen, progress: float | None) -> tuple[Tensor, list[Tensor | None]]:
        """The loss of each row and, to ascend, the directions at the outputs to backpropagate."""
        given = seen.outputs, seen.rows.targets, seen.rows.size
        return (self.objective.values(*given), []) if progress is None else self.objective.ascent(*given, progress)

    def _offer(self, seen: Seen, pool: Pool, values: Tensor) -> Tensor:
        """Offer what was seen to the pool; returns which samples look adversarial."""
        judged = self.objective.judge(seen.outputs, seen.rows.targets, values)
        adversarial, lost, values = (seen.rows.kept(t) for t in (*judged, values))
        pool.best.offer(seen.x, adversarial, values.masked_fill(lost, -torch.inf))
        pool.broken.logical_or_(lost)
        return adversarial

    def _gradient(self, seen: Seen, directions: list[Tensor | None], pool: Pool) -> Tensor:
        """The gradient at the samples of a pool, which learns which of them were broken."""
        pairs = zip(seen.outputs.tensors, directions, strict=True)
        wanted = [(output, direction) for output, direction in pairs if direction is not None and output.requires_grad]
        (gradient,) = torch.autograd.grad([o for o, _ in wanted], seen.leaf, [d for _, d in wanted])
        if self.settings.before is not None:  # it may overflow behind the boundary
            gradient = gradient.nan_to_num(0.0)
        if seen.watch.broken is not None:
            pool.broken.logical_or_(seen.rows.kept(seen.watch.broken))
        return seen.rows.kept(gradient)

    def _confirm(self, pool: Pool, x: Tensor, adversarial: Tensor) -> Tensor | None:
        """Keep what exact decisions confirm; returns the places of the samples that are left, None for all."""
        nominated = adversarial.nonzero().squeeze(1)
        if len(nominated) == 0:
            return None
        confirmed = self._judge(pool.index.index_select(0, nominated), x.index_select(0, nominated))
        left = torch.ones_like(adversarial).index_put_((nominated,), ~confirmed).nonzero().squeeze(1)
        return left if len(left) < len(x) else None

    def _settle(self, pool: Pool) -> Tensor:
        """Judge the best candidates exactly; returns the samples that were broken or wrongly held adversarial."""
        confirmed = self._judge(pool.index, pool.best.x)
        return pool.index[pool.broken | (pool.best.adversarial & ~confirmed)]

    def _judge(self, index: Tensor, x: Tensor) -> Tensor:
        """Offer candidates as they would be returned, on exact logits; returns which are adversarial.

        Args:
            index: their places in the caller's batch, each once, in rising order.
            x: the candidates.
        """
        whole = len(index) == len(self.ball.origin)
        ball, targets = (self.ball, self.targets) if whole else (self.ball.take(index), self.targets.take(index))
        x = ball.finish(x)
        outputs = self._outputs(self.settings.exact, x)
        values = self.objective.values(outputs, targets, len(x))
        adversarial, lost = self.objective.judge(outputs, targets, values)
        best = self.found if whole else self.found.take(index)
        best.offer(x, adversarial, values.masked_fill(lost, -torch.inf))
        if not whole:
            self.found.put(index, best)
        return adversarial

    def _outputs(self, network: FastAttackModel, x: Tensor) -> Packed:
        before = self.settings.before
        return self.objective.accept(network(x if before is None else before(x)), len(x))


def beside(ball: Ball, generator: torch.Generator) -> Tensor:
    """An iterate a little beside each sample, drawn on the generator's device."""
    noise = torch.randn(ball.origin.shape, generator=generator, device=generator.device, dtype=ball.working)
    size = min(BESIDE * (ball.upper - ball.lower), ball.eps / 10)
    return ball.project_(ball.start().add_(noise.to(ball.origin.device), alpha=size))
