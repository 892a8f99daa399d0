"""How many operators the boundary adds to a step on a processor: each takes microseconds, whatever the network."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv_adapters import FastAttackModel

MOST = 30


class Counting(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def operators(model: nn.Module, x: Tensor) -> list[str]:
    with Counting() as counting:
        z = x.clone().requires_grad_()
        torch.autograd.grad(model(z).logsumexp(1).sum(), z)
    names: list[str] = counting.names
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_has_few_operators_of_ours(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """With the gradient scaled, unscaled, filtered and counted, and with a look for changes."""
    if request.config.getoption("--engine") == "cudagraph":
        pytest.skip("its stand-in keeps the boundary's state as on a device")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10)).eval().requires_grad_(False)
    x = torch.rand(4, 20)
    fast = FastAttackModel(net, dtype=dtype, engine="eager")
    for _ in range(3):
        operators(fast, x)  # the self-check and the audit
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        plain = operators(net, x)
    ours = operators(fast, x)
    assert len(plain) < len(ours) <= len(plain) + MOST, ours
