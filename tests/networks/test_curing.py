"""Calls that raise in half precision alone, for a branch that the self-check's samples did not take."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.modules import HALF
from tests.support.tools import batch, input_gradient


class Deeper(nn.Module):
    """Bright images go a longer way, whose result is written into that of the shorter one."""

    def __init__(self, *, always_raises: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.near, self.deep = nn.Linear(192, 32), nn.Linear(32, 10), nn.Linear(32, 32)
        self.far, self.always_raises = nn.Linear(32, 10), always_raises

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1)).relu()
        out: Tensor = self.near(h)
        bright = x.mean((1, 2, 3)) > 0.3
        if bright.any():
            if self.always_raises:
                raise RuntimeError("expected scalar type Bright")
            out = out.clone()
            out[bright] = self.far(self.deep(h[bright]).relu())
        return out


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_branch_that_joins_dtypes_runs_in_float32(dtype: torch.dtype) -> None:
    model, (x, y) = Deeper().eval(), batch(16)
    dark = x * 0.1
    fast = FastAttackModel(model, dtype=dtype, engine="eager")
    input_gradient(fast, dark, y)
    assert fast.dtype == dtype
    with pytest.warns(FastAttackWarning, match="runs in float32.*it raised.*#not-half"):
        found = input_gradient(fast, x, y)
    assert torch.allclose(found, input_gradient(model, x, y), atol=1e-6)
    assert fast.dtype == torch.float32
    assert "it raised" in fast.summary()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        input_gradient(fast, x, y)


def test_an_error_of_the_models_own_changes_nothing() -> None:
    model, (x, y) = Deeper(always_raises=True).eval(), batch(16)
    fast: Any = FastAttackModel(model, dtype=torch.bfloat16, engine="eager")
    input_gradient(fast, x * 0.1, y)
    with pytest.raises(RuntimeError, match="scalar type Bright"):
        input_gradient(fast, x, y)
    assert fast.dtype == torch.bfloat16
    assert "raised" not in fast.summary()


def test_an_interrupt_changes_nothing() -> None:
    model, (x, y) = Deeper().eval(), batch(16)
    fast: Any = FastAttackModel(model, dtype=torch.bfloat16, engine="eager")
    input_gradient(fast, x * 0.1, y)
    run, runs = fast._run, iter([0, 1])

    def interrupted(arguments: Any) -> Any:
        if next(runs):
            raise KeyboardInterrupt
        return run(arguments)

    vars(fast)["_run"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        input_gradient(fast, x, y)
    assert fast.dtype == torch.bfloat16
