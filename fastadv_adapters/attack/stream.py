"""``SafePGD`` on a stream of samples: whoever is done leaves the batch at once, and the next takes the place.

The same iterates, losses, candidates, rescue, early stop and cycles as in ``search``, but each sample is at a step of
its own. What a sample goes through does not depend on who stands beside it, but for rounding.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..boundary import Packed
from ..model import FastAttackModel
from .balls import ball_around
from .cycles import Past, can_cycle
from .flow import Departed, Entrants, Flow, Streaming
from .looking import Looking
from .objectives import AnotherClass, OneRival
from .pool import Best, Pool, padded_rows
from .resting import Footing
from .safe_pgd import SafePGD
from .search import start_at
from .steps import LEAST_ROWS, rows_for
from .targets import Targets

Source = Callable[[int], Flow | None]
"""Gives up to so many samples, None once there are no more."""


def stream_of(attack: SafePGD, way: Streaming, *, rivals: bool, largest_label: int) -> "Stream":
    """A stream of samples through this attack.

    Args:
        attack: says what is done at each sample; untargeted. Its generator is not used.
        way: how the stream runs.
        rivals: whether each start raises one class, which comes with the sample, instead of the attack's loss.
        largest_label: among all samples.
    """
    objective = OneRival(largest_label) if rivals else AnotherClass(attack.loss, False, largest_label)
    stops = not rivals and attack.loss.repeats and can_cycle(attack.step_sizes, attack.model.device)
    settings = replace(attack._settings(classes=True), stops_cycles=stops, generator=None)
    return Stream(settings, objective, way, attack._full)


@dataclass
class Stream(Looking):
    """One attack on samples that come in and go out.

    Attributes:
        way: how it runs.
        full: the network for samples whose gradients were spoilt, or that the fast one wrongly held adversarial.
    """

    way: Streaming
    full: FastAttackModel
    _doubtful: list[Flow] = field(default_factory=list, init=False)
    _footing: Footing | None = field(default=None, init=False)

    def run(self, source: Callable[[int], Entrants | None]) -> Iterator[Departed]:
        """Attack whoever comes, at most ``capacity`` at once, until the source is dry."""

        def entering(count: int) -> Flow | None:
            entrants = source(count)
            return None if entrants is None else self._entered(entrants)

        yield from self._flow(self.settings.fast, entering)
        while self._doubtful:
            yield from self._flow(self.full, self._doubted)

    def _flow(self, network: FastAttackModel, source: Source) -> Iterator[Departed]:
        flow, dry = None, False
        while True:
            room = self.way.capacity - (len(flow) if flow else 0)
            while room > 0 and not dry:
                more = source(room)
                dry = more is None
                if more is not None:
                    flow = more if flow is None or len(flow) == 0 else flow.join(more)
                    room = self.way.capacity - len(flow)
            if flow is None or len(flow) == 0:
                return
            flow, gone = self._advance(network, flow)
            if len(gone):
                yield gone.departed()

    @torch.no_grad()
    def _entered(self, entrants: Entrants) -> Flow:
        way, x = self.way, entrants.x
        ball = ball_around(way.norm, x, eps=way.eps, bounds=way.bounds)
        turn = torch.zeros_like(entrants.y)
        tree = (entrants.y, entrants.rivals, turn) if entrants.rivals.shape[1] else entrants.y
        spoilt = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        pool = Pool(entrants.index, Targets(Packed(tree)), ball, ball.start(), Best.none(x.clone()), spoilt)
        if self.settings.stops_cycles:
            pool.past = Past.fresh(pool.x)
        flow = Flow.of(pool, x)
        self._begin(flow, torch.arange(len(x), device=x.device))
        return flow

    def _begin(self, flow: Flow, places: Tensor) -> None:
        """Put the samples at these places to the beginning of the start that they are at."""
        pool = flow.pool
        index, starts = pool.index[places].tolist(), flow.start[places].tolist()
        if self.settings.start == "origin":
            pool.x.index_copy_(0, places, pool.ball.take(places).start())
        else:  # one by one: a sample's start does not depend on who begins beside it
            for place, i, start in zip(places.split(1), index, starts, strict=True):
                seed = self.way.seed_of(i, start)
                pool.x.index_copy_(0, place, start_at(self.settings, pool.ball.take(place), seed))
        flow.step.index_fill_(0, places, 0)
        if len(pool.targets.packed.tensors) > 1:
            pool.targets.packed.tensors[-1].copy_(flow.start)
            pool.forget_rows()
        if pool.past is not None:
            pool.past.forget(places)

    @torch.no_grad()
    def _advance(self, network: FastAttackModel, flow: Flow) -> tuple[Flow, Flow]:
        """One look, and one step for whoever goes on; returns who stays and who leaves."""
        begun, count = time.perf_counter(), len(flow)
        confirmed, gradient = self._look_at(network, flow)
        ended = (flow.step >= len(self.settings.step_sizes)) & ~confirmed
        if gradient is not None:
            ended |= self._step(network, flow, gradient) & ~confirmed
        again = ended & (flow.start + 1 < self.way.starts)
        if len(places := again.nonzero().squeeze(1)):
            flow.start[places] += 1
            self._begin(flow, places)
        leaving = confirmed | (ended & ~again)
        done = leaving.nonzero().squeeze(1)
        if len(done) == 0:
            flow.seconds += (time.perf_counter() - begun) / count
            return flow, flow.take(done)
        gone = self._settled(network, flow.take(done))
        flow = flow.take((~leaving).nonzero().squeeze(1))
        taken = (time.perf_counter() - begun) / count
        flow.seconds += taken
        gone.seconds += taken
        return flow, gone

    def _look_at(self, network: FastAttackModel, flow: Flow) -> tuple[Tensor, Tensor | None]:
        """Offer the iterates; returns who is adversarial for certain, and the gradient.

        There is no gradient if few would use it: those are looked at again, beside others who take the free places.
        """
        pool, votes, total = flow.pool, torch.zeros_like(flow.step), None
        steps = len(self.settings.step_sizes)
        confirmed = votes > 0
        for number in range(self.way.passes):
            seen = self._see(network, pool, ascend=True)
            progress = (flow.step / max(1, steps - 1)).clamp(max=1.0)
            values, directions = self._rate(seen, seen.rows.spread(progress)[:, None])
            flow.forwards += 1
            votes += self._offer(seen, pool, values, self._inside(flow))
            if number == self.way.passes - 1:
                confirmed = self._confirm(flow, seen.x, 2 * votes > self.way.passes)
            going = int((~confirmed & (flow.step < steps)).sum())
            if going == 0 or (self.way.passes == 1 and 3 * going < 2 * len(flow)):
                total = None  # the other passes still vote
                continue
            gradient = self._gradient(seen, directions, pool)
            flow.backwards += 1
            total = gradient if total is None else total + gradient
        return confirmed, total

    @property
    def _has_other_balls(self) -> bool:
        return any(radius != 1 for radius in self.settings.radii)

    def _inside(self, flow: Flow) -> Tensor | None:
        """Whether iterates are within eps, None if all are."""
        if not self._has_other_balls:
            return None
        known = torch.tensor([1.0, *self.settings.radii], device=flow.step.device)
        return known[flow.step] == 1

    def _step(self, network: FastAttackModel, flow: Flow, gradient: Tensor) -> Tensor:
        """Step and project, each sample by its own step size; returns whose iterates are in a cycle."""
        pool, device = flow.pool, flow.step.device
        last = len(self.settings.step_sizes) - 1
        at = flow.step.clamp(max=last)
        sizes = torch.tensor(self.settings.step_sizes, dtype=pool.x.dtype, device=device)[at]
        shape = (-1, *(1,) * (gradient.ndim - 1))
        radii = [self.settings.radii[step] for step in at.tolist()] if self._has_other_balls else [1.0]
        if set(radii) == {1.0}:
            pool.ball.step_(pool.x, gradient, sizes.view(shape))
        else:
            for radius in sorted(set(radii)):
                places = torch.tensor([i for i, r in enumerate(radii) if r == radius], device=device)
                ball = pool.ball.take(places).times(radius)
                moved = ball.step_(pool.x[places], gradient[places], radius * sizes[places].view(shape))
                pool.x.index_copy_(0, places, moved)
        flow.step += 1
        return self._cycling(network, flow)

    def _cycling(self, network: FastAttackModel, flow: Flow) -> Tensor:
        past = flow.pool.past
        none = torch.zeros_like(flow.step, dtype=torch.bool)
        if past is None:
            return none
        if self._footing is None:
            self._footing = Footing(network, none.device)
        if self._footing.moved():
            past.forget(torch.arange(len(flow), device=none.device))
        cycling = past.returned(flow.pool.x)
        if cycling.any() and not self._footing.bears():
            cycling = none
        self._footing.begin()
        return cycling

    def _confirm(self, flow: Flow, x: Tensor, adversarial: Tensor) -> Tensor:
        """Which of the nominated are adversarial for certain."""
        nominated = adversarial.nonzero().squeeze(1)
        if len(nominated) == 0:
            return torch.zeros_like(adversarial)
        part = flow.take(nominated)
        margins = self._exactly(part, x.index_select(0, nominated))
        flow.found.put(nominated, part.found)
        flow.forwards.index_add_(0, nominated, torch.full_like(nominated, self.way.passes))
        return torch.zeros_like(adversarial).index_copy_(0, nominated, margins > self.way.clearance)

    def _exactly(self, flow: Flow, x: Tensor) -> Tensor:
        """Offer candidates on exact logits; returns by how much they are adversarial, at most 0 if they are not."""
        pool, count = flow.pool, len(flow)
        rows = padded_rows(count, max(count, LEAST_ROWS), torch.zeros((), dtype=torch.int64, device=x.device))
        ball, targets = pool.ball.take(rows), pool.targets.take(rows)
        margins: list[Tensor] = []
        for _ in range(self.way.passes):
            best = flow.found.take(rows)
            adversarial, outputs = self._judged(ball, targets, best, x.index_select(0, rows))
            logits = outputs.tensors[0]
            top = logits.topk(2, 1).values
            apart = (top[:, 0] - top[:, 1]) / logits.abs().amax(1).clamp_min(torch.finfo(logits.dtype).tiny)
            margins.append(torch.where(adversarial, apart, -1.0)[:count])
            flow.found = best.take(rows[:count])
        return torch.stack(margins).sort(0).values[(len(margins) - 1) // 2]  # deterministic on CUDA, unlike median

    def _settled(self, network: FastAttackModel, flow: Flow) -> Flow:
        """Judge the best candidates of those who have no start left; who is in doubt waits for full precision."""
        open_ = (~flow.found.adversarial).nonzero().squeeze(1)
        if len(open_) == 0:
            return flow
        part = flow.take(open_)
        self._exactly(part, part.pool.best.x)
        part.forwards += self.way.passes
        flow.found.put(open_, part.found)
        flow.forwards.index_copy_(0, open_, part.forwards)
        if network is self.full:
            return flow
        pool = flow.pool
        doubtful = (pool.spoilt | pool.best.adversarial) & ~flow.found.adversarial
        if doubtful.any():
            self._doubtful.append(flow.take(doubtful.nonzero().squeeze(1)))
            flow = flow.take((~doubtful).nonzero().squeeze(1))
        return flow

    @torch.no_grad()
    def _doubted(self, count: int) -> Flow | None:
        """Samples that are attacked anew in full precision."""
        if not self._doubtful:
            return None
        flow = self._doubtful.pop()
        if len(flow) > count:
            places = torch.arange(len(flow), device=flow.step.device)
            self._doubtful.append(flow.take(places[count:]))
            flow = flow.take(places[:count])
        origin = flow.pool.ball.origin
        flow.pool.best, flow.pool.spoilt = Best.none(origin.clone()), torch.zeros_like(flow.pool.spoilt)
        flow.start.zero_()
        self._begin(flow, torch.arange(len(flow), device=flow.step.device))
        return flow

    def _size(self, network: FastAttackModel, samples: int) -> int:
        """How many rows the network is given: few different numbers where each costs.

        Never fewer than a handful: a single row is rounded otherwise, so batches of any size give the same bits.
        """
        costs = self.settings.shapes_cost and network is self.settings.fast
        return max(LEAST_ROWS, rows_for(samples, self.way.capacity) if costs else samples)
