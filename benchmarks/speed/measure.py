"""One network attacked in every way: seconds, memory, first calls and updates."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shared.report import timing_record
from benchmarks.shared.rows import PLAIN, Prepared, Row, Setup, short
from benchmarks.shared.timing import NO_TIME, Budget, Timing, Way, measure_in_turn, reason, seconds_of
from benchmarks.speed.cases import Case
from benchmarks.speed.floor import Rates, Work, Yardsticks, work_of
from benchmarks.speed.memory import allocated, kept_per_image, peak_above

NEAR = 1.2
"""Ways that take at most so many times as long as the fastest are nearly as fast."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        steps: of projected gradient descent.
        repeats: timed rounds, at most.
        closer: rounds more, at most, for the ways that are nearly as fast as the fastest, where that is asked for.
        updates: timed rounds of the updates.
        matrix_size: rows and columns of the matrices whose products are the yardstick.
        mebibytes: size of the copy that is the other.
    """

    steps: int
    repeats: int
    closer: int
    updates: int
    matrix_size: int
    mebibytes: int


@dataclass
class Found:
    """What was measured of one way; None for what was not, or does not apply.

    Attributes:
        first_s: seconds of building it and of the first attack: compiling, capturing, looking for algorithms.
        timing: of later attacks.
        update: of bringing it up to date after all weights have changed.
        kept: bytes per image that a forward pass keeps for the backward pass; not told on a GPU.
        first_peak: most bytes that tensors held during the first attack, beyond network and batch; on a GPU alone.
        peak: the same of a later attack. A CUDA graph has its memory already then.
        failure: why it could not be measured.
        update_failure: why it could not be updated.
    """

    first_s: float | None = None
    timing: Timing | None = None
    update: Timing | None = None
    kept: float | None = None
    first_peak: int | None = None
    peak: int | None = None
    failure: str | None = None
    update_failure: str | None = None

    @property
    def memory(self) -> float | None:
        """Bytes per batch to compare by: the highest peak on a GPU, else what is kept."""
        peaks = [peak for peak in (self.first_peak, self.peak) if peak is not None]
        return max(peaks) if peaks else self.kept


@dataclass(frozen=True)
class Measurement:
    """All ways on one network.

    Attributes:
        case: the network.
        rows: the ways.
        found: by their keys.
        work: of one step.
        rates: of the device, in turn with the attacks.
        steps: of an attack.
        rounds: timed rounds that were made.
        closer: how many more for the ways that are nearly as fast as the fastest.
    """

    case: Case
    rows: Sequence[Row]
    found: dict[str, Found]
    work: Work
    rates: Rates
    steps: int
    rounds: int
    closer: int

    def median(self, key: str) -> float | None:
        """Median seconds of an attack in this way."""
        timing = self.found[key].timing if key in self.found else None
        return timing.median if timing else None

    def record(self) -> dict[str, Any]:
        """All numbers."""
        dtypes = self.rates.flops_per_s
        return {
            "title": self.case.title,
            "batch": self.case.batch,
            "image_x_steps": self.case.batch * self.steps,
            "flops_per_step": self.work.flops,
            "matrix_elements_per_step": self.work.elements,
            "matrix_flops_per_s": {short(d): rate for d, rate in dtypes.items()},
            "copy_bytes_per_s": self.rates.bytes_per_s,
            "floor_s": {short(d): self.steps * self.rates.floor(self.work, d) for d in dtypes},
            "rows": {row.key: self._row(row) for row in self.rows},
        }

    def _row(self, row: Row) -> dict[str, Any]:
        found = self.found[row.key]
        seconds, plain = self.median(row.key), self.median(PLAIN)
        told: dict[str, Any] = {"label": row.label, "dtype": short(row.dtype), "ours": row.ours}
        if found.failure or seconds is None:
            return {**told, "failure": found.failure}
        rate = self.rates.flops_per_s[row.dtype]
        return {
            **told,
            **timing_record(found.timing or Timing((seconds,))),
            "ratio_to_plain": plain / seconds if plain else None,
            "share_of_matrix_peak": self.steps * self.work.flops / rate / seconds,
            "share_of_floor": self.steps * self.rates.floor(self.work, row.dtype) / seconds,
            "first_s": found.first_s,
            "update": timing_record(found.update) if found.update else None,
            "update_failure": found.update_failure,
            "bytes_kept_per_image": found.kept,
            "first_peak_bytes": found.first_peak,
            "peak_bytes": found.peak,
            "memory": found.memory,
        }


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
            _begin(row, model, x, y, effort.steps, found, ready)
    dtypes = tuple(dict.fromkeys(row.dtype for row in rows))
    yardsticks = Yardsticks(device, dtypes, matrix_size=effort.matrix_size, mebibytes=effort.mebibytes)
    timings = _attacks(ready, x, y, found, yardsticks, effort, device, budget)
    rates = yardsticks.rates(timings)
    rounds = min((len(timing.seconds) for timing in timings.values()), default=0)
    more = _closer({key: ready[key] for key in timings}, x, y, timings, effort, budget) if closer else {}
    timings.update({key: timings[key].and_then(timing) for key, timing in more.items()})
    for key, timing in timings.items():
        found[key].timing = timing
    _updates(model, {key: ready[key] for key in timings}, found, effort, device)
    rounds_more = min((len(timing.seconds) for timing in more.values()), default=0)
    return Measurement(case, rows, found, work, rates, effort.steps, rounds, rounds_more)


def _begin(
    row: Row,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    steps: int,
    found: dict[str, Found],
    ready: dict[str, Prepared],
) -> None:
    """Build one way, attack for the first time, and look at its memory."""
    setup = Setup(row.eps, steps, x.device)
    before = allocated(x.device)

    def first() -> None:
        ready[row.key] = row.build(model, setup)
        ready[row.key].attack(x, y)

    entry = found[row.key] = Found()
    try:
        measured: list[float] = []
        entry.first_peak = peak_above(before, x.device, lambda: measured.append(seconds_of(first, x.device)))
        entry.first_s = measured[0]
        if x.device.type == "cuda":
            entry.peak = peak_above(before, x.device, lambda: ready[row.key].attack(x, y))
        else:
            entry.kept = kept_per_image(ready[row.key], x)
    except Exception as error:
        entry.failure = reason(error)
        ready.pop(row.key, None)
    if entry.failure:  # the error is gone now, and with it all that its traceback held
        forget()


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
    attacks = {key: _attack(prepared, x, y) for key, prepared in ready.items()}
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
    near = {key: _attack(ready[key], x, y) for key, timing in timings.items() if timing.median <= NEAR * fastest}
    if len(near) < 2 or budget.left < 0:
        return {}
    return measure_in_turn(near, device=x.device, repeats=effort.closer, warmup=0, budget=budget)


def _attack(prepared: Prepared, x: Tensor, y: Tensor) -> Way:
    return Way(lambda: prepared.attack(x, y))


def _updates(
    model: nn.Module, ready: dict[str, Prepared], found: dict[str, Found], effort: Effort, device: torch.device
) -> None:
    """Time the updates after a change of all weights, in turn; last, for the weights are others then."""
    parameters = list(model.parameters())

    def change() -> None:
        with torch.no_grad():
            torch._foreach_mul_(parameters, 1.0001)  # type: ignore[arg-type]

    ways = {key: Way(prepared.update, change) for key, prepared in ready.items() if prepared.update is not None}
    failures: dict[str, str] = {}
    timings = measure_in_turn(ways, device=device, repeats=effort.updates, warmup=1, failures=failures)
    for key, timing in timings.items():
        found[key].update = timing
    for key, why in failures.items():
        found[key].update_failure = why


def forget() -> None:
    """Give back what nobody uses any more: graphs, cached memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
