"""How long one step of an attack takes in a few ways, on the device and on the host, and what it holds."""

import time
from typing import Any

import torch

from benchmarks.gpu.clock import device_ms, host_ms
from benchmarks.gpu.items import Items
from benchmarks.shared.rows import EPS, PLAIN, Row, Setup, every_row
from benchmarks.speed.cases import Case, cases
from benchmarks.speed.memory import allocated, peak_above
from fastadv_adapters.comparison import synchronize

WAYS = (PLAIN, "recipe-float16-scaled", "ours-eager-float16", "ours-cudagraph-float16")


def steps(items: Items) -> None:
    """Every network in every way that the device knows."""
    rows = [row for row in every_row(items.device) if row.key in WAYS]
    for case in cases(items.size):
        for row in rows:
            key = f"{case.key}, {row.key}"
            items.add(key, lambda case=case, row=row: _step(items, case, row), need=10.0)  # type: ignore[misc]


def _step(items: Items, case: Case, row: Row) -> dict[str, Any]:
    device, runs = items.device, 2 if items.tiny else 10
    model, x, y = case.make(device)
    before, start = allocated(device), time.perf_counter()
    prepared = row.build(model, Setup(EPS, 1, device))
    first_peak = peak_above(before, device, lambda: prepared.gradient(x, y))
    synchronize(device)
    found: dict[str, Any] = {"first s": time.perf_counter() - start, "first peak bytes": first_peak}
    found["peak bytes"] = peak_above(before, device, lambda: prepared.gradient(x, y))
    found["ms"] = device_ms(lambda: prepared.gradient(x, y), device, runs=runs)
    found["host ms"] = host_ms(lambda: prepared.gradient(x, y), device, runs=runs)
    if items.cuda:
        found["reserved bytes"] = torch.cuda.memory_reserved(device)
    return found
