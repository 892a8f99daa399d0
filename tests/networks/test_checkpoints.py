"""What another library has put in the place of PyTorch's checkpoints stays there, and is what runs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from fastadv_adapters import FastAttackModel
from tests.support.tools import attackable_net, batch, input_gradient


def test_a_function_that_was_patched_in_later_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ran = checkpoint.CheckpointFunction, list[str]()

    class Offloaded(theirs):  # type: ignore[misc, valid-type]
        """As libraries for offloaded checkpoints have it."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ran.append("theirs")
            return theirs.forward(ctx, *args)

    monkeypatch.setattr(checkpoint, "CheckpointFunction", Offloaded)
    input_gradient(FastAttackModel(attackable_net(), dtype=torch.float32), *batch(4))
    assert checkpoint.CheckpointFunction is Offloaded
    layer = nn.Linear(3, 3)
    out: Tensor = checkpoint.checkpoint(layer, torch.rand(2, 3, requires_grad=True), use_reentrant=True)
    out.sum().backward()
    assert ran == ["theirs"]
