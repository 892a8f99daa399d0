"""Where the time of one step goes, kernel by kernel."""

import re
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.clock import searching
from benchmarks.gpu.items import Items
from benchmarks.shared.rows import EPS, Setup, ours
from benchmarks.speed.cases import Case, cases
from fastadv_adapters.comparison import synchronize

KINDS = {
    "layout": r"nchwToNhwc|nhwcToNchw|Padding|transpose",
    "convolution, product, attention": (
        r"cudnn|xmma|cutlass|gemm|nvjet|sm90|sm80|dgrad|fprop|wgrad|implicit|fmha|flash|attention|winograd|convol"
    ),
    "elementwise": r"elementwise|vectorized|unrolled|triton_poi",
    "reduction, norm": r"reduce|norm|softmax|triton_red|triton_per",
    "copy": r"Memcpy|Memset|copy|CatArray",
}
"""Kinds of kernels by their names; the first pattern that is found counts."""

TOP = 22
"""So many of the slowest kernels are told by name."""


def kernels(items: Items) -> None:
    """Every network, eager in float16: what a recording replays, with its kernels named."""
    for case in cases(items.size):
        items.add(case.key, lambda case=case: _profiled(items, case), need=12.0)  # type: ignore[misc]


def _profiled(items: Items, case: Case) -> dict[str, Any]:
    model, x, y = case.make(items.device)
    prepared = ours(model, Setup(EPS, 1, items.device), dtype=torch.float16, engine="eager")
    activity = ProfilerActivity.CUDA if items.cuda else ProfilerActivity.CPU
    with searching():
        for _ in range(2):
            prepared.gradient(x, y)
        synchronize(items.device)
        with profile(activities=[activity]) as profiled:
            prepared.gradient(x, y)
            synchronize(items.device)
    times = "self_device_time_total" if items.cuda else "self_cpu_time_total"
    return by_kind([(e.key, e.count, getattr(e, times) / 1e3) for e in profiled.key_averages()])


def by_kind(found: list[tuple[str, int, float]]) -> dict[str, Any]:
    """Kernels, as name, calls and milliseconds, added up by kind, and the slowest of them."""
    kinds: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, calls, ms in found:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")
        kinds[kind][0] += calls
        kinds[kind][1] += ms
    told = {f"{kind}, ms": round(ms, 3) for kind, (_, ms) in kinds.items()}
    slowest = sorted(found, key=lambda kernel: -kernel[2])[:TOP]
    return {
        **told,
        "calls": {kind: calls for kind, (calls, _) in kinds.items()},
        "slowest": [[name[:110], calls, round(ms, 3)] for name, calls, ms in slowest],
    }
