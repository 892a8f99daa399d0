"""What another library has put in the place of PyTorch's checkpoints stays there, and is what runs."""

import gc
from contextlib import nullcontext
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_of_the_self_check_and_the_audit_are_not_offloaded(dtype: torch.dtype) -> None:
    net, (x, y) = attackable_net(), batch(8)
    fast, packed = FastAttackModel(net, dtype=dtype), list[int]()

    def pack(saved: Tensor) -> Tensor:
        packed[-1] += 1
        return saved

    for _ in range(2):
        packed.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            input_gradient(fast, x, y)
    assert packed[0] == packed[1] > 0


@pytest.mark.parametrize("hooked", [False, True])
def test_the_self_check_leaves_no_tensor_behind(hooked: bool) -> None:
    """An operator that saves its output would keep it, and all that it came from, if a hook packed it as it is."""
    net, (x, y) = attackable_net(), batch(8)
    counts = []
    for _ in range(3):
        hooks = torch.autograd.graph.save_on_cpu() if hooked else nullcontext()
        with hooks:
            input_gradient(FastAttackModel(net, dtype=torch.bfloat16), x, y)
        gc.collect()
        counts.append(sum(isinstance(thing, Tensor) for thing in gc.get_objects()))
    assert counts[1] == counts[2]


class Energy(nn.Module):
    """Logits beside the gradient of an energy, by a transform that PyTorch refuses under hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = attackable_net()

    def forward(self, x: Tensor) -> Tensor:
        score = torch.func.grad(lambda image: self.net(image).logsumexp(1).sum())(x)
        logits: Tensor = self.net(x - 0.1 * score)
        return logits


def test_a_model_with_a_transform_inside_runs() -> None:
    net, (x, y) = Energy().eval(), batch(8)
    fast = FastAttackModel(net, dtype=torch.float32)
    assert (cosine(input_gradient(fast, x, y), input_gradient(net, x, y)) > 0.999).all()
