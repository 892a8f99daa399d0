"""One way to attack, from being built to being brought up to date; and to be forgotten."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

from benchmarks.shared.rows import Prepared, Row, Setup
from benchmarks.speed.measurement import Effort, Found
from benchmarks.speed.memory import allocated, kept_per_image, peak_above
from fastadv_adapters.comparison import Way, measure_in_turn, reason, seconds_of


def begin(row: Row, model: nn.Module, batch: tuple[Tensor, Tensor], steps: int, found: Found) -> Prepared | None:
    """Build one way, attack for the first time, and look at its memory; None if that fails, and `found` says why."""
    x, y = batch
    setup = Setup(row.eps, steps, x.device)
    before = allocated(x.device)
    ready: list[Prepared] = []

    def first() -> None:
        ready.append(row.build(model, setup))
        ready[0].attack(x, y)

    try:
        measured: list[float] = []
        found.first_peak = peak_above(before, x.device, lambda: measured.append(seconds_of(first, x.device)))
        found.first_s = measured[0]
        if x.device.type == "cuda":
            found.peak = peak_above(before, x.device, lambda: ready[0].attack(x, y))
        else:
            found.kept = kept_per_image(ready[0], x)
    except Exception as error:
        found.failure = reason(error)
        ready.clear()
    if found.failure:  # the error is gone now, and with it all that its traceback held
        forget()
    return ready[0] if ready else None


def attack_of(prepared: Prepared, x: Tensor, y: Tensor) -> Way:
    """The attack on this batch, to be timed."""
    return Way(lambda: prepared.attack(x, y))


def time_updates(
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


def start_afresh() -> None:
    """Nothing that was compiled or captured before is to be met, or to hold memory, from now on."""
    torch._dynamo.reset()
    forget()
