"""What each way that is prepared and switched off would bring: a recorded step without it and with it."""

from typing import Any

import torch

from benchmarks.gpu.clock import device_ms, recorded
from benchmarks.gpu.compiling import Step, inside
from benchmarks.gpu.items import Items
from benchmarks.gpu.operators import half
from benchmarks.gpu.smoke import least_cosine
from benchmarks.speed.cases import Case
from fastadv_adapters import FastAttackModel
from fastadv_adapters.kernels import switched

Switches = dict[str, Any]

TRANSFORMERS: dict[str, Switches] = {
    "norms in 16 bits": {"narrow_norms": True},
    "norms and stream in 16 bits": {"narrow_norms": True, "narrow_stream": True},
}
RESIDUAL: dict[str, Switches] = {"ReLUs fused": {"fused": True}}
EVERY: dict[str, Switches] = {
    "first layer on 4 channels": {"first_channels": 4},
    "first layer on 8 channels": {"first_channels": 8},
}


def prepared(items: Items) -> None:
    """Every network in every way of which it has some use."""
    for case in items.cases:
        for name, switches in {**(TRANSFORMERS if case.key == "vit" else RESIDUAL), **EVERY}.items():
            key = f"{case.key}, {name}"
            items.add(key, lambda case=case, on=switches: _compared(items, case, on), need=15.0)  # type: ignore[misc]


def _compared(items: Items, case: Case, switches: Switches) -> dict[str, Any]:
    found: dict[str, Any] = {}
    gradients: list[torch.Tensor] = []
    model, x, _ = case.make(items.device)
    for name, on in {"off": {}, "on": switches}.items():
        with switched(**on, device=items.device.type):
            networks = FastAttackModel(model, dtype=half(items), engine="eager")._networks
        network, precision = networks.folded.network, networks.precision
        step = Step(inside(network, precision), precision.enter(x).detach())
        step()
        gradients.append(step.gradient.float())
        found[f"{name}, recorded, ms"] = device_ms(recorded(step, items.device), items.device)
        found["refused by cuDNN"] = sum(vars(part).get("refused", False) for part in network.modules())
    return {**found, "least cosine": least_cosine(*gradients), "the same": torch.equal(*gradients)}
