"""Changes at a bad time: weights, images, structure, device, between passes that belong together."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning
from tests.support.tools import batch, cosine, input_gradient, reference, small_net

FLOAT32: Any = {"dtype": torch.float32}


def step(net: nn.Module, *, fused: bool = False) -> None:
    """One step of an optimizer, in place."""
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(net.parameters(), lr=0.05, fused=fused).step()
    net.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_between_forward_and_backward_gives_the_gradient_of_the_forwards_weights(
    fused: bool, dtype: torch.dtype
) -> None:
    net, (x, y) = small_net().eval(), batch(3)
    fast = FastAttackModel(net, dtype=dtype)
    expected = input_gradient(fast, x, y)
    leaf = x.clone().requires_grad_()
    loss = F.cross_entropy(fast(leaf), y)
    step(net, fused=fused)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)
    assert not torch.equal(input_gradient(fast, x, y), expected)


def test_a_step_and_another_forward_between_forward_and_backward_is_an_error() -> None:
    net, (x, y) = small_net().eval(), batch(3)
    fast, leaf = FastAttackModel(net, **FLOAT32), x.clone().requires_grad_()
    loss = F.cross_entropy(fast(leaf), y)
    step(net)
    fast(leaf)
    with pytest.raises(RuntimeError, match="but the fast model was updated in between"):
        loss.backward()


def test_a_step_between_forward_and_backward_of_the_twin_is_pytorchs_own_error() -> None:
    """As in the plain model: the twin runs the model's own weights."""
    net, (x, y) = small_net().eval(), batch(3)
    twin = FastAttackModel(net, **FLOAT32).view(full_precision=True)
    for model in (twin, net):
        leaf = x.clone().requires_grad_()
        loss = F.cross_entropy(model(leaf), y)
        step(net)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_images_changed_between_forward_and_backward_are_pytorchs_own_error() -> None:
    fast, (x, y) = FastAttackModel(small_net(), **FLOAT32), batch(3)
    leaf = x.clone().requires_grad_()
    loss = F.cross_entropy(fast(leaf), y)
    with torch.no_grad():
        leaf.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("change", ["module", "width", "hook", "dtype", "training"])
def test_a_structure_that_changes_between_steps_of_an_attack_is_followed(change: str) -> None:
    net, (x, y) = small_net().eval(), batch(3)
    fast = FastAttackModel(net, **FLOAT32, logits_dtype=torch.float64)
    input_gradient(fast, x, y)
    network = fast._networks.folded.network
    if change == "module":
        net[2] = nn.Tanh()
    elif change == "width":
        net[7] = nn.Linear(16, 12)
    elif change == "hook":
        net[3].register_forward_hook(lambda module, inputs, output: output * 2)
    elif change == "dtype":
        net.double()
        head: Any = net[7]
        head.weight.data = head.weight.data * torch.linspace(-1, 1, 10).double()[:, None]
    elif change == "training":
        net.train()
    found, expected = input_gradient(fast, x, y), input_gradient(reference(net), x.double(), y)
    assert (cosine(found, expected) > 0.9999).all()
    assert (fast._networks.folded.network is network) == (change == "training"), "a mode is no change"


@pytest.mark.cuda
@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_a_change_of_device_is_followed_there_and_back(engine: Any) -> None:
    net, (x, y) = small_net().eval(), batch(3)
    fast = FastAttackModel(net, **FLOAT32, engine=engine)
    expected = input_gradient(fast, x, y)
    for device in ("cuda", "cpu", "cuda"):
        net.to(device)
        assert next(fast.parameters()).device.type == device
        with pytest.raises(ValueError, match="expected inputs on the model's device"):
            fast(x.to("cpu" if device == "cuda" else "cuda"))
        found = input_gradient(fast, x.to(device), y.to(device))
        assert found.device.type == device
        assert (cosine(found.cpu(), expected) > 0.999).all()
        assert fast.gradient_stats.samples == 3


class Viewing(nn.Module):
    """Wants contiguous maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.conv(x).view(len(x), -1))
        return out


def test_a_warning_that_is_an_error_comes_once_and_the_model_goes_on() -> None:
    net, (x, y) = Viewing(), batch(3)
    fast = FastAttackModel(net, **FLOAT32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAttackWarning)
        with pytest.raises(FastAttackWarning, match="contiguous layout"):
            input_gradient(fast, x, y)
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(net, x, y)) > 0.9999).all()


def test_second_order_after_a_step_is_an_error_and_not_of_the_new_weights() -> None:
    net, (x, y) = small_net(), batch()
    fast, x = FastAttackModel(net, **FLOAT32), x.requires_grad_()
    loss = F.cross_entropy(fast(x), y)
    with torch.no_grad():
        next(net.parameters()).mul_(1.5)
    with pytest.raises(RuntimeError, match="the weights of its forward pass"):
        torch.autograd.grad(loss, x, create_graph=True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(fast(x), y), x, create_graph=True)
    assert gradient.requires_grad
