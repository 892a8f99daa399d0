"""What another library has put in the place of PyTorch's checkpoints stays there, and is what runs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from fastadv_adapters import FastAttackModel
from tests.support.tools import attackable_net, batch, cosine, input_gradient


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fast_model_may_be_checkpointed_from_its_first_call_on(dtype: torch.dtype) -> None:
    """The self-check is no part of what the checkpoint runs again, which must save as many tensors as the first run."""
    net, (x, y) = attackable_net(), batch(8)
    fast, exact = FastAttackModel(net, dtype=dtype), input_gradient(net, x, y)

    def gradient() -> Tensor:
        return input_gradient(lambda images: checkpoint.checkpoint(fast, images, use_reentrant=False), x, y)

    for _ in range(2):
        assert (cosine(gradient(), exact) > 0.99).all()
    net.add_module("added", nn.Identity())  # built and checked anew
    assert (cosine(gradient(), exact) > 0.99).all()


def test_tensors_of_the_self_check_are_not_offloaded() -> None:
    net, (x, y) = attackable_net(), batch(8)
    fast, packed = FastAttackModel(net, dtype=torch.float32), list[int]()

    def pack(saved: Tensor) -> Tensor:
        packed[-1] += 1
        return saved

    for _ in range(2):
        packed.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            input_gradient(fast, x, y)
    assert packed[0] == packed[1] > 0
