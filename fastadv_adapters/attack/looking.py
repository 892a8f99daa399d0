"""How ``SafePGD`` looks at iterates: a pass of a network, candidates offered, and the gradient to step along."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..boundary import Packed, Watch, watch_gradients
from ..model import FastAttackModel
from ..modules import filled_gradients_of
from .balls import Ball
from .objectives import Objective
from .pool import Best, Pool, Rows
from .targets import Targets

Start = Literal["random", "beside", "origin"]


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
        generator: says on which device starts are drawn; None for that of the samples.
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
        watch: tells which of its gradients were spoilt.
    """

    x: Tensor
    rows: Rows
    leaf: Tensor
    outputs: Packed
    watch: Watch


@dataclass
class Looking:
    """What a loop over iterates needs, whichever samples it holds. Nothing here waits for the device."""

    settings: Settings
    objective: Objective

    def _see(self, network: FastAttackModel, pool: Pool, *, ascend: bool) -> Seen:
        """Show the network the iterates, as a leaf of a graph that is gone before a step writes into them."""
        x = pool.x.to(pool.ball.origin.dtype)  # what the model sees: iterates in x's dtype
        rows = pool.rows(self._size(network, len(x)))
        leaf = rows.spread(x).detach().requires_grad_(ascend)
        with torch.set_grad_enabled(ascend), watch_gradients() as watch:
            outputs = self._outputs(network, leaf)
        return Seen(x, rows, leaf, outputs, watch)

    def _size(self, network: FastAttackModel, samples: int) -> int:
        """How many rows the network is given for so many samples."""
        raise NotImplementedError

    def _rate(self, seen: Seen, progress: float | Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        """The loss of each row and, to ascend, the directions at the outputs to backpropagate."""
        given = seen.outputs, seen.rows.targets, seen.rows.size
        return (self.objective.values(*given), []) if progress is None else self.objective.ascent(*given, progress)

    def _offer(self, seen: Seen, pool: Pool, values: Tensor, inside: Tensor | None = None) -> Tensor:
        """Offer what was seen to the pool; returns which samples look adversarial.

        ``inside`` says which of them are within eps, None for all: only those are candidates.
        """
        judged = self.objective.judge(seen.outputs, seen.rows.targets, values)
        adversarial, lost, values = (seen.rows.kept(t) for t in (*judged, values))
        if inside is not None:
            adversarial, values = adversarial & inside, values.masked_fill(~inside, -torch.inf)
        pool.best.offer(seen.x, adversarial, values.masked_fill(lost, -torch.inf))
        pool.spoilt.logical_or_(lost)
        return adversarial

    def _gradient(self, seen: Seen, directions: list[Tensor | None], pool: Pool) -> Tensor:
        """The gradient at the samples of a pool, which learns which of them were spoilt."""
        pairs = zip(seen.outputs.tensors, directions, strict=True)
        wanted = [(output, direction) for output, direction in pairs if direction is not None and output.requires_grad]
        outputs, grads = [o for o, _ in wanted], [d for _, d in wanted]
        (gradient,) = filled_gradients_of(outputs, [seen.leaf], grads)
        if self.settings.before is not None:  # it may overflow behind the boundary
            gradient = gradient.nan_to_num(0.0)
        if seen.watch.spoilt is not None:
            pool.spoilt.logical_or_(seen.rows.kept(seen.watch.spoilt))
        return seen.rows.kept(gradient)

    def _judged(self, ball: Ball, targets: Targets, best: Best, x: Tensor) -> tuple[Tensor, Packed]:
        """Offer candidates as they would be returned, on exact logits; returns which are adversarial, and these."""
        x = ball.finish(x)
        outputs = self._outputs(self.settings.exact, x)
        values = self.objective.values(outputs, targets, len(x))
        adversarial, lost = self.objective.judge(outputs, targets, values)
        best.offer(x, adversarial, values.masked_fill(lost, -torch.inf))
        return adversarial, outputs

    def _outputs(self, network: FastAttackModel, x: Tensor) -> Packed:
        before = self.settings.before
        if before is not None or not x.requires_grad:  # the model's pass with a gradient has a copy of its own
            x = x.clone()  # they may write into it
        return self.objective.accept(network(x if before is None else before(x)), len(x))
