"""The loop of ``SafePGD``: iterates, candidates, and who is left."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..boundary import Watch, watch_gradients
from ..model import FastAttackModel
from .balls import Ball
from .checks import accept_logits
from .losses import Loss
from .pool import Best, Pool
from .steps import rows_for


@dataclass(frozen=True)
class Settings:
    """What an attack does, settled before it meets a batch.

    Attributes:
        fast: gives logits and gradients.
        exact: gives the logits that count.
        before: a differentiable function between x and the model, or None.
        loss: what is climbed.
        targeted: whether labels are to be reached.
        step_sizes: one per step.
        random_start: whether each restart begins at a random point.
        generator: says on which device these points are drawn; None for the CPU.
        early_stop: whether confirmed samples are dropped.
        shapes_cost: whether every new batch size costs the fast model time.
    """

    fast: FastAttackModel
    exact: FastAttackModel
    before: Callable[[Tensor], Tensor] | None
    loss: Loss
    targeted: bool
    step_sizes: tuple[float, ...]
    random_start: bool
    generator: torch.Generator | None
    early_stop: bool
    shapes_cost: bool


class Seen(NamedTuple):
    """A forward pass.

    Attributes:
        x: what was asked about, (N, ...), without history.
        leaf: what the network was given: x, and copies of one of its samples that bring the batch to its size.
        logits: of the leaf, with history where a gradient is wanted.
        labels: of the leaf.
        watch: tells which of its gradients were broken.
    """

    x: Tensor
    leaf: Tensor
    logits: Tensor
    labels: Tensor
    watch: Watch


@dataclass
class Search:
    """One attack on one batch: the loop, with the fast network and then, for some samples, in full precision.

    Nothing here waits for the device but :meth:`run`, once at its end, and with ``early_stop`` each look.

    Attributes:
        found: the best candidates of the whole batch, as exact decisions judge them.
    """

    settings: Settings
    ball: Ball
    labels: Tensor
    largest_label: int
    seeds: list[int]
    found: Best
    _progress: float = field(default=0.0, init=False)

    def run(self, network: FastAttackModel, index: Tensor) -> Tensor:
        """Attack the samples at ``index``; returns which of them need an attack in full precision."""
        pool = self._pool(index)
        if self.settings.random_start:  # otherwise the first iterate is the sample itself
            pool, _ = self._look(network, pool, ascend=False)
        for seed in self.seeds:
            if len(pool.index):
                pool.x = self._start(seed, pool)
                pool = self._restart(network, pool)
        return self._settle(pool) if len(pool.index) else pool.index

    def _pool(self, index: Tensor) -> Pool:
        x = self.ball.origin
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        whole = torch.arange(len(x), device=x.device)
        pool = Pool(whole, self.labels, self.ball, self.ball.start(), Best.none(x.clone()), broken)
        return pool if len(index) == len(x) else pool.take(index)

    def _start(self, seed: int, pool: Pool) -> Tensor:
        """Iterates to begin with. They are drawn for the whole batch, so a sample's does not depend on who is left."""
        if not self.settings.random_start:
            return pool.ball.start()
        given = self.settings.generator
        generator = torch.Generator(given.device if given else pool.x.device).manual_seed(seed)
        x = self.ball.random_start(generator)
        return x if len(pool.index) == len(x) else x.index_select(0, pool.index)

    def _restart(self, network: FastAttackModel, pool: Pool) -> Pool:
        """All steps from one start; returns the samples that are left."""
        sizes = self.settings.step_sizes
        for step, size in enumerate(sizes):
            self._progress = step / max(1, len(sizes) - 1)
            pool, gradient = self._look(network, pool, ascend=True)
            if len(pool.index) == 0:
                return pool
            pool.ball.step_(pool.x, gradient, size)
        return self._look(network, pool, ascend=False)[0]

    def _look(self, network: FastAttackModel, pool: Pool, *, ascend: bool) -> tuple[Pool, Tensor]:
        """Offer the iterates as candidates; returns who is left and, to ``ascend``, the gradient of their loss."""
        seen = self._see(network, pool, ascend=ascend)
        loss, direction = self._rate(seen, ascend=ascend)
        adversarial = self._offer(seen, pool, loss)
        places = self._confirm(pool, seen.x, adversarial) if self.settings.early_stop else None
        left = pool if places is None else pool.take(places)
        if not ascend or len(left.index) == 0:
            return left, left.x
        if places is None:
            return pool, self._gradient(seen, direction, pool)
        if 3 * self._rows(network, len(places)) < 2 * len(seen.leaf):
            # Forward again for those who are left costs less than backward for everyone.
            del seen  # and what it keeps for a backward pass
            seen = self._see(network, left, ascend=True)
            direction = _of_rows(direction.index_select(0, places), left, len(seen.leaf))
            return left, self._gradient(seen, direction, left)
        gradient = self._gradient(seen, direction, pool).index_select(0, places)
        left.broken.copy_(pool.broken.index_select(0, places))
        return left, gradient

    def _see(self, network: FastAttackModel, pool: Pool, *, ascend: bool) -> Seen:
        """Show the network the iterates, as a leaf of a graph that is gone before a step writes into them."""
        x = pool.x.to(self.ball.origin.dtype)  # what the model sees: iterates in x's dtype
        size = self._rows(network, len(x))
        labels = pool.labels if size == len(x) else pool.padded(size).labels
        leaf = _of_rows(x, pool, size).detach().requires_grad_(ascend)
        with torch.set_grad_enabled(ascend), watch_gradients() as watch:
            logits = self._logits(network, leaf)
        return Seen(x, leaf, logits, labels, watch)

    def _rows(self, network: FastAttackModel, samples: int) -> int:
        """How many rows the network is given for so many samples: few different numbers where each costs."""
        costs = self.settings.shapes_cost and network is self.settings.fast
        return rows_for(samples, len(self.ball.origin)) if costs else samples

    def _offer(self, seen: Seen, pool: Pool, loss: Tensor) -> Tensor:
        """Offer what was seen to the pool; returns which samples look adversarial."""
        logits, loss = (_first(t, len(seen.x)) for t in (seen.logits, loss))
        adversarial, lost = self._adversarial(logits, pool.labels)
        pool.best.offer(seen.x, adversarial, loss.masked_fill(lost, -torch.inf))
        pool.broken.logical_or_(lost)
        return adversarial

    def _gradient(self, seen: Seen, direction: Tensor, pool: Pool) -> Tensor:
        """The gradient at the samples of a pool, which learns which of them were broken."""
        (gradient,) = torch.autograd.grad(seen.logits, seen.leaf, direction)
        if self.settings.before is not None:  # it may overflow behind the boundary
            gradient = gradient.nan_to_num(0.0)
        if seen.watch.broken is not None:
            pool.broken.logical_or_(_first(seen.watch.broken, len(seen.x)))
        return _first(gradient, len(seen.x))

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
        whole = len(index) == len(self.labels)
        ball, labels = (
            (self.ball, self.labels) if whole else (self.ball.take(index), self.labels.index_select(0, index))
        )
        x = ball.finish(x)
        logits = self._logits(self.settings.exact, x)
        adversarial, lost = self._adversarial(logits, labels)
        best = self.found if whole else self.found.take(index)
        best.offer(x, adversarial, self.settings.loss(logits, labels).masked_fill(lost, -torch.inf))
        if not whole:
            self.found.put(index, best)
        return adversarial

    def _rate(self, seen: Seen, *, ascend: bool) -> tuple[Tensor, Tensor]:
        """The loss and, to ``ascend``, the direction at the logits to backpropagate."""
        loss = self.settings.loss
        return (
            loss.ascent(seen.logits, seen.labels, self._progress)
            if ascend
            else (loss(seen.logits, seen.labels), seen.logits)
        )

    def _logits(self, network: FastAttackModel, x: Tensor) -> Tensor:
        before = self.settings.before
        logits = network(x if before is None else before(x))
        return accept_logits(logits, len(x), self.largest_label)

    def _adversarial(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples are adversarial, and which have lost their finite logits, which is no success."""
        lost = (logits.abs().amax(1) < torch.inf).logical_not_()  # NaN is not less either
        predicted = logits.argmax(1)
        hit = predicted == labels if self.settings.targeted else predicted != labels
        return hit > lost, lost


def _of_rows(values: Tensor, pool: Pool, size: int) -> Tensor:
    """Values per sample of a pool as values per row of a batch."""
    return values if size == len(values) else values.index_select(0, pool.padded(size).rows)


def _first(values: Tensor, count: int) -> Tensor:
    """The rows before the padding."""
    return values if len(values) == count else values[:count]
