"""What the device is, and how fast products, copies and small kernels are on it."""

from typing import Any

import torch

from benchmarks.gpu.clock import device_ms, recorded
from benchmarks.gpu.items import Items
from benchmarks.shared.rows import short
from benchmarks.speed.cases import SCALES
from benchmarks.speed.floor import device_copy, matrix_product

KERNELS = 100
"""So many small kernels, each of which waits for the one before, are in a recording."""


def environment(items: Items) -> None:
    """Facts and yardsticks."""
    items.add("facts", lambda: _facts(items.device))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        items.add(f"product, {short(dtype)}", lambda dtype=dtype: _product(items, dtype))  # type: ignore[misc]
    items.add("copy", lambda: _copy(items))
    items.add("small kernels in a recording", lambda: _small(items.device))


def _facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
        "TF32 in products": torch.backends.cuda.matmul.allow_tf32,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"multiprocessors": properties.multi_processor_count, "L2 bytes": properties.L2_cache_size}
    return facts


def _product(items: Items, dtype: torch.dtype) -> dict[str, float]:
    way, flops = matrix_product(items.device, dtype, size=SCALES[items.size].matrix_size)
    return {"TFLOP/s": 1e-9 * flops / device_ms(way.run, items.device, runs=1)}


def _copy(items: Items) -> dict[str, float]:
    way, moved = device_copy(items.device, mebibytes=SCALES[items.size].mebibytes)
    return {"TB/s": 1e-9 * moved / device_ms(way.run, items.device, runs=1)}


def _small(device: torch.device) -> dict[str, float]:
    number = torch.zeros((), device=device)

    def work() -> None:
        for _ in range(KERNELS):
            number.add_(1)

    return {"microseconds each": 1e3 * device_ms(recorded(work, device), device) / KERNELS}
