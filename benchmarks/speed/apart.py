"""One network attacked in every way, one after the other: each has the memory for itself, and each is kept at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from benchmarks.shared.budget import NO_TIME, Budget
from benchmarks.shared.deadline import STOPPED, OutOfTimeError
from benchmarks.shared.rows import PLAIN, Row
from benchmarks.speed.cases import Case
from benchmarks.speed.floor import Rates, Yardsticks, work_of
from benchmarks.speed.measurement import Effort, Found, Measurement
from benchmarks.speed.one_way import attack_of, begin, start_afresh, time_updates
from fastadv_adapters.comparison import measure_in_turn

ATTACKS = 4
"""A way needs about so many attacks: the first, one for its memory, and two that are timed."""


class Forecast:
    """The seconds that a way is thought to take, so that none is begun that would not fit.

    Args:
        compiling: seconds for a way that compiles, as long as none has been measured.
    """

    def __init__(self, compiling: float) -> None:
        self._compiling = compiling
        self._taken: dict[str, float] = {}

    def of(self, row: Row, plain_s: float) -> float:
        """What it took on the last network, or what attacks take that are no faster than the plain one.

        Args:
            row: the way.
            plain_s: seconds of a plain attack on this network, 0 if not known.
        """
        known = self._taken.get(row.key, self._compiling if row.compiles else 0.0)
        return max(known, ATTACKS * plain_s)

    def learn(self, row: Row, seconds: float) -> None:
        """A way took so long."""
        self._taken[row.key] = seconds
        if row.compiles:
            self._compiling = seconds


def measure_apart(
    case: Case,
    rows: Sequence[Row],
    effort: Effort,
    device: torch.device,
    *,
    budget: Budget,
    seed: int,
    forecast: Forecast,
    urgent: Collection[str],
    tell: Callable[[Measurement], None],
) -> Measurement:
    """Attack one network in all these ways, each alone, with the memory of the one before given back.

    Args:
        case: the network.
        rows: the ways; what cannot be timed on this device is left out.
        effort: how much.
        device: where.
        budget: for all of it. A way that would not fit is not begun, one that takes longer is stopped.
        seed: of weights, images and random starts.
        forecast: what ways take; learns from these.
        urgent: keys of the ways that come first, after the plain one.
        tell: called after every way with all that is known so far.
    """
    rows = [row for row in rows if row.timed]
    model, x, y = case.make(device, seed=seed)
    work, rates = work_of(model, x), _rates(rows, effort, device)
    weights = [p.detach().clone() for p in model.parameters()]
    found: dict[str, Found] = {}

    def measurement() -> Measurement:
        rounds = [len(entry.timing.seconds) for entry in found.values() if entry.timing]
        return Measurement(case, rows, found, work, rates, effort.steps, min(rounds, default=0), 0, apart=True)

    order = sorted(rows, key=lambda row: (row.key != PLAIN, row.key not in urgent, row.compiles))
    for index, row in enumerate(order):
        plain = found[PLAIN].timing if PLAIN in found else None
        found[row.key] = entry = Found()
        if budget.left < forecast.of(row, plain.median if plain else 0.0):
            entry.failure = NO_TIME
        else:
            share = budget.share(1 / (len(order) - index))
            _measure(row, model, (x, y), effort, budget, share, entry)
            forecast.learn(row, budget_used(share))
            _restore(model, weights)
        start_afresh()
        tell(measurement())
    return measurement()


def budget_used(budget: Budget) -> float:
    """Seconds since a budget began."""
    return budget.seconds - budget.left


def _rates(rows: Sequence[Row], effort: Effort, device: torch.device) -> Rates:
    """The yardsticks alone, so that they hold no memory beside an attack."""
    dtypes = tuple(dict.fromkeys(row.dtype for row in rows))
    yardsticks = Yardsticks(device, dtypes, matrix_size=effort.matrix_size, mebibytes=effort.mebibytes)
    rates = yardsticks.rates(measure_in_turn(yardsticks.ways, device=device, repeats=effort.repeats))
    del yardsticks
    start_afresh()
    return rates


def _measure(
    row: Row,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    effort: Effort,
    budget: Budget,
    share: Budget,
    entry: Found,
) -> None:
    """All of one way, into `entry`; rounds are cut for its share, and it is stopped at the end of the budget."""
    try:
        with budget.held():
            prepared = begin(row, model, batch, effort.steps, entry)
            if prepared is None:
                return
            ways, failures = {row.key: attack_of(prepared, *batch)}, dict[str, str]()
            timings = measure_in_turn(
                ways, device=batch[0].device, repeats=effort.repeats, warmup=0, budget=share, failures=failures
            )
            entry.timing, entry.failure = timings.get(row.key), failures.get(row.key)
            if entry.timing:
                time_updates(model, {row.key: prepared}, {row.key: entry}, effort, batch[0].device)
    except OutOfTimeError:
        if entry.timing is None:
            entry.failure = STOPPED
        else:
            entry.update_failure = STOPPED


def _restore(model: nn.Module, weights: Sequence[Tensor]) -> None:
    """The weights that updates have changed, for the next way is to attack the same network."""
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
