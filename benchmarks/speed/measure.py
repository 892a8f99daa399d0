"""One network attacked in every way, in turn: seconds, memory, first calls and updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.shared.budget import NO_TIME, Budget
from benchmarks.shared.rows import Prepared, Row
from benchmarks.speed.cases import Case
from benchmarks.speed.floor import Yardsticks, work_of
from benchmarks.speed.measurement import Effort, Found, Measurement
from benchmarks.speed.one_way import attack_of, begin, time_updates
from fastadv_adapters.comparison import Timing, measure_in_turn

NEAR = 1.2
"""Ways that take at most so many times as long as the fastest are nearly as fast."""


def measure_network(
    case: Case,
    rows: Sequence[Row],
    effort: Effort,
    device: torch.device,
    *,
    budget: Budget,
    seed: int,
    closer: bool = False,
) -> Measurement:
    """Attack one network in all these ways, in turn.

    Args:
        case: the network.
        rows: the ways; what cannot be timed on this device is left out.
        effort: how much.
        device: where.
        budget: for all of it. Ways that compile are left out once two thirds are used up; rounds are cut, to two.
        seed: of weights, images and random starts.
        closer: whether the ways that are nearly as fast as the fastest get further rounds of their own.
    """
    rows = [row for row in rows if row.timed]
    model, x, y = case.make(device, seed=seed)
    work = work_of(model, x)
    found: dict[str, Found] = {}
    ready: dict[str, Prepared] = {}
    building = budget.share(2 / 3)
    for row in sorted(rows, key=lambda row: row.compiles):  # what takes a compiler's time comes last
        if row.compiles and building.left < 0:
            found[row.key] = Found(failure=NO_TIME)
        else:
            found[row.key] = Found()
            prepared = begin(row, model, (x, y), effort.steps, found[row.key])
            if prepared:
                ready[row.key] = prepared
    dtypes = tuple(dict.fromkeys(row.dtype for row in rows))
    yardsticks = Yardsticks(device, dtypes, matrix_size=effort.matrix_size, mebibytes=effort.mebibytes)
    timings = _attacks(ready, x, y, found, yardsticks, effort, device, budget)
    rates = yardsticks.rates(timings)
    rounds = min((len(timing.seconds) for timing in timings.values()), default=0)
    more = _closer({key: ready[key] for key in timings}, x, y, timings, effort, budget) if closer else {}
    timings.update({key: timings[key].and_then(timing) for key, timing in more.items()})
    for key, timing in timings.items():
        found[key].timing = timing
    time_updates(model, {key: ready[key] for key in timings}, found, effort, device)
    rounds_more = min((len(timing.seconds) for timing in more.values()), default=0)
    return Measurement(case, rows, found, work, rates, effort.steps, rounds, rounds_more)


def _attacks(
    ready: dict[str, Prepared],
    x: Tensor,
    y: Tensor,
    found: dict[str, Found],
    yardsticks: Yardsticks,
    effort: Effort,
    device: torch.device,
    budget: Budget,
) -> dict[str, Timing]:
    """Time attacks and yardsticks in turn. The first attacks were the warm-up of the ways that are ready."""
    failures: dict[str, str] = {}
    attacks = {key: attack_of(prepared, x, y) for key, prepared in ready.items()}
    for way in yardsticks.ways.values():
        way.run()
    timings = measure_in_turn(
        {**attacks, **yardsticks.ways},
        device=device,
        repeats=effort.repeats,
        warmup=0,
        budget=budget,
        failures=failures,
    )
    for key, why in failures.items():
        found[key].failure = why
    return timings


def _closer(
    ready: dict[str, Prepared], x: Tensor, y: Tensor, timings: dict[str, Timing], effort: Effort, budget: Budget
) -> dict[str, Timing]:
    """Time once more, in turn, the ways within NEAR of the fastest: a few rounds cannot tell them apart."""
    fastest = min((timing.median for timing in timings.values()), default=0.0)
    near = {key: attack_of(ready[key], x, y) for key, timing in timings.items() if timing.median <= NEAR * fastest}
    if len(near) < 2 or budget.left < 0:
        return {}
    return measure_in_turn(near, device=x.device, repeats=effort.closer, warmup=0, budget=budget)
