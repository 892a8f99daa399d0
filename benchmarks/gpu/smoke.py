"""Whether gradients are right in every dtype and with every engine, again and after an update."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.items import Items
from benchmarks.shared.rows import EPS, Prepared, Setup, mean_loss, ours, short
from benchmarks.speed.cases import cases
from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import row_cosines

IMAGES = 16
"""At most so many images are looked at: float64 is slow on GPUs."""


def smoke(items: Items) -> None:
    """The first network in every dtype, recorded and eager."""
    model, x, y = cases(items.size)[0].make(items.device)
    x, y = x[:IMAGES], y[:IMAGES]
    for engine in ("cudagraph", "eager") if items.cuda else ("eager",):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            # Of a copy: the item changes the weights.
            items.add(
                f"{engine}, {short(dtype)}",
                lambda engine=engine, dtype=dtype: _look(copy.deepcopy(model), x, y, engine, dtype),  # type: ignore[misc]
            )


def exact_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient at x in float64."""
    return Prepared(lambda x, y: x, copy.deepcopy(model).double(), mean_loss).gradient(x.double(), y)


def least_cosine(found: Tensor, expected: Tensor) -> float:
    """Of all samples the least cosine between two gradients."""
    return row_cosines(found.double().flatten(1), expected.double().flatten(1)).min().item()


def _look(model: nn.Module, x: Tensor, y: Tensor, engine: str, dtype: torch.dtype) -> dict[str, Any]:
    prepared, exact = ours(model, Setup(EPS, 1, x.device), dtype=dtype, engine=engine), exact_gradient(model, x, y)
    fast = prepared.network
    assert isinstance(fast, FastAttackModel)  # noqa: S101  # for the type checker
    gradients = [prepared.gradient(x, y) for _ in range(3)]
    with torch.no_grad():
        off = (fast(x) - model(x)).abs().max().item()
        torch._foreach_mul_(list(model.parameters()), 1.0001)
    return {
        "least cosine": min(least_cosine(gradient, exact) for gradient in gradients),
        "least cosine after an update": least_cosine(prepared.gradient(x, y), exact_gradient(model, x, y)),
        "the same when repeated": torch.equal(gradients[1], gradients[2]),
        "logits off by": off,
        "engine": fast.engine,
        "notes": [str(note) for note in fast._networks.notes],
        "gradient_stats": fast.gradient_stats._asdict(),
    }
