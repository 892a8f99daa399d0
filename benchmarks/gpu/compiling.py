"""What compiling brings inside a recording: the fast network as it is, and as inductor makes it."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import device_ms, recorded
from benchmarks.gpu.items import Items
from benchmarks.gpu.operators import half
from benchmarks.gpu.smoke import least_cosine
from benchmarks.speed.cases import Case
from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import synchronize
from fastadv_adapters.modules import Precision

BACKEND = "inductor"


class Step:
    """Forward and backward pass of a network at x; `gradient` is the last one's."""

    def __init__(self, network: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.network, self.x = network, x
        self.gradient = x

    def __call__(self) -> None:
        leaf = self.x.detach().requires_grad_()
        with torch.enable_grad():
            out = self.network(leaf)
        (self.gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))


def inside(run: Callable[[Tensor], Tensor], precision: Precision) -> Callable[[Tensor], Tensor]:
    """A network in its context, which stays outside of what is compiled, as in the engine."""

    def body(t: Tensor) -> Tensor:
        with precision.context():
            return run(t)

    return body


def compiling(items: Items) -> None:
    """Every network."""
    for case in items.cases:
        items.add(case.key, lambda case=case: _compared(items, case), need=25.0)  # type: ignore[misc]


def _compared(items: Items, case: Case) -> dict[str, Any]:
    device = items.device
    model, x, _ = case.make(device)
    networks = FastAttackModel(model, dtype=half(items), engine="eager")._networks
    network, precision = networks.folded.network, networks.precision
    entered = precision.enter(x).detach()
    eager = Step(inside(network, precision), entered)
    eager()
    expected = eager.gradient.float()
    start = time.perf_counter()
    made = torch.compile(network, fullgraph=True, dynamic=False, backend=BACKEND)
    compiled = Step(inside(made, precision), entered)
    compiled()
    synchronize(device)
    return {
        "compiling s": time.perf_counter() - start,
        "least cosine": least_cosine(compiled.gradient.float(), expected),
        "eager, recorded, ms": device_ms(recorded(eager, device), device),
        "compiled, ms": device_ms(compiled, device),
        "compiled, recorded, ms": device_ms(recorded(compiled, device), device),
    }
