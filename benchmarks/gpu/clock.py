"""Time on the device, on the host, and in a recording."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastadv_adapters.comparison import synchronize
from fastadv_adapters.engines.graphs import CudaRecorder

Work = Callable[[], object]


def device_ms(work: Work, device: torch.device, *, runs: int = 10, rounds: int = 5) -> float:
    """Median milliseconds of one run, of several rounds of runs without waiting between them; two more warm up."""
    for _ in range(2):
        work()
    synchronize(device)
    measure = _by_events if device.type == "cuda" else _by_clock
    return statistics.median(measure(work, runs) for _ in range(rounds))


def _by_events(work: Work, runs: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(runs):
        work()
    end.record()
    end.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed / runs


def _by_clock(work: Work, runs: int) -> float:
    start = time.perf_counter()
    for _ in range(runs):
        work()
    return 1e3 * (time.perf_counter() - start) / runs


def host_ms(work: Work, device: torch.device, *, runs: int = 10) -> float:
    """Milliseconds until the host has given one run to the device."""
    synchronize(device)
    found = _by_clock(work, runs)
    synchronize(device)
    return found


def recorded(work: Work, device: torch.device) -> Work:
    """The work as a CUDA graph, recorded as the package records; the work itself where there is no CUDA."""
    if device.type != "cuda":
        return work
    recorder = CudaRecorder(device)
    with recorder.turn():
        recorder.warm(work, looks=False)  # it may be compiled
        return recorder.capture(work)


@contextmanager
def searching() -> Iterator[None]:
    """CuDNN looks for its fastest algorithm for each shape inside, as it does while the package records."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
