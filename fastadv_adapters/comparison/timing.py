"""Measuring in turn: A B B A ..., warm-up apart, medians with quartiles, synchronised on GPUs."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..modules import first_line


@dataclass(frozen=True)
class Way:
    """One way of doing the work that is compared.

    Attributes:
        run: does the work once; timed.
        prepare: called before every `run`, not timed (changes weights before an update, say).
    """

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Timing:
    """The measured seconds of one way, warm-up left out."""

    seconds: tuple[float, ...]
    warmup_seconds: float = 0.0

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)

    def and_then(self, other: "Timing") -> "Timing":
        """This one, and what was measured of the same way later."""
        return Timing(self.seconds + other.seconds, self.warmup_seconds + other.warmup_seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile, in seconds: the spread that is reported."""
        return quartiles(self.seconds)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; of one value that twice."""
    if len(values) < 2:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


class HasTimeLeft(Protocol):
    """Whatever knows how many seconds a measurement may still take."""

    @property
    def left(self) -> float:
        """Seconds that are left; negative once they are used up."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work that was given to it; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with the device idle on both sides of the clock."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def measure_in_turn(
    ways: Mapping[str, Way | Callable[[], object]],
    *,
    device: torch.device,
    repeats: int = 7,
    warmup: int = 1,
    budget: HasTimeLeft | None = None,
    failures: dict[str, str] | None = None,
) -> dict[str, Timing]:
    """Time every way `repeats` times, in turn, so that a slow phase of the machine meets all of them alike.

    Args:
        ways: name to `Way`, or to a callable without preparation.
        device: whose work is waited for on both sides of the clock.
        repeats: timed rounds, at least 1.
        warmup: rounds before them, timed apart: compilation, allocation, caches.
        budget: after the second timed round no further one is begun that would not fit into it.
        failures: where the reason is put if a way raises; it is left out from then on. None: the error is raised.

    Returns:
        Name to `Timing`, in the order given, ways that failed left out.

    Raises:
        ValueError: if `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"expected repeats of at least 1, got {repeats}; give a larger number")
    prepared = {name: way if isinstance(way, Way) else Way(way) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    longest = 0.0
    for number in range(warmup + repeats):
        if number >= warmup + 2 and budget is not None and budget.left < longest:
            break
        begun = time.perf_counter()
        # A B B A: what a way leaves behind (a hot core, a heap in pieces) falls upon both of its neighbours.
        for name in list(seconds)[:: -1 if number % 2 else 1]:
            way = prepared[name]
            try:
                if way.prepare is not None:
                    way.prepare()
                seconds[name].append(seconds_of(way.run, device))
            except Exception as error:
                if failures is None:
                    raise
                failures[name] = reason(error)
                del seconds[name]
        if number >= warmup:
            longest = max(longest, time.perf_counter() - begun)
    return {name: Timing(tuple(taken[warmup:]), sum(taken[:warmup])) for name, taken in seconds.items()}


def reason(error: Exception) -> str:
    """An error in one short line: its type and the first line of its text."""
    return first_line(error).replace("|", "/")[:160]
