"""Code that asks: for a dtype, for `requires_grad`, how many samples there are, whether a layer is there yet."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, FastAttackWarning
from tests.support.tools import attackable_net, batch, cosine, head_of, input_gradient, small_net


class Asks(nn.Module):
    """Computes something else where its weights want a gradient, or a tensor that is an attribute does."""

    def __init__(self, *, attribute: bool = False) -> None:
        super().__init__()
        self.net = small_net()
        self.plain = torch.ones(1, requires_grad=attribute)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits.flip(1) if head_of(self.net).weight.requires_grad or self.plain.requires_grad else logits


class ReadsAbove(nn.Module):
    """Reads the weights of a layer, into which a batch norm is folded, if there are more than six samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 6:
            layer = self.net[0]
            return nn.functional.conv2d(x, layer.weight, padding=1).relu().mean((2, 3))  # type: ignore[arg-type]
        logits: Tensor = self.net(x)
        return logits[:, :8]


class InItsOwnDtype(nn.Module):
    """Computes something else if its weights are not in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        weight = head_of(self.net).weight
        logits: Tensor = self.net(x.to(weight.dtype))
        return logits if weight.dtype == torch.bfloat16 else logits.flip(1)


class MadeLate(nn.Module):
    """Makes its last layer in the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(192, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        if not hasattr(self, "last"):
            self.last = nn.Linear(x.shape[1], 10)
        logits: Tensor = self.last(x)
        return logits


class ByNumber(nn.Module):
    """Adds a constant if there are more than eight samples, which turns no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits + 10 if len(x) > 8 else logits


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@DTYPES
@pytest.mark.parametrize(("trains", "attribute"), [(True, False), (False, True), (False, False)])
def test_code_that_asks_whether_weights_want_a_gradient(trains: bool, attribute: bool, dtype: torch.dtype) -> None:
    net, (x, y) = Asks(attribute=attribute).eval().requires_grad_(trains), batch()
    fast, differs = FastAttackModel(net, dtype=dtype), pytest.warns(FastAttackWarning, match="not-folded")
    if trains or attribute:  # the fast network is frozen
        with differs:
            found = input_gradient(fast, x, y)
    else:
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(net, x, y)) > 0.98).all()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
    assert all(p.grad is None for p in net.parameters())
    with torch.no_grad():
        head_of(net.net).weight.mul_(-1)
    assert (cosine(input_gradient(fast, x, y), input_gradient(net, x, y)) > 0.98).all()


def test_weights_want_no_gradient_in_derivatives_of_second_order() -> None:
    net, (x, y) = small_net().eval(), batch()
    fast = FastAttackModel(net, dtype=torch.float32)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(fast(leaf), y), leaf, create_graph=True)
    gradient.square().sum().backward()
    assert all(p.grad is None for p in fast._networks.twin.engine.network.parameters())
    assert not torch.func.vmap(fast)(x[:, None]).requires_grad


def test_what_the_first_samples_do_not_show_is_noticed_by_the_audit_in_every_precision() -> None:
    """The self-check sees four samples, the audit eight: no dtype of the fast network is near, so the twin is taken."""
    net, (x, y) = ReadsAbove().eval(), batch(12)
    y %= 8
    fast, truth = FastAttackModel(net, dtype=torch.bfloat16), input_gradient(net, x, y)
    with pytest.warns(FastAttackWarning, match=r"in full precision, on the model's twin, from now on.*#audit-failed"):
        first = input_gradient(fast, x, y)
    second = input_gradient(fast, x, y)
    assert (cosine(second, truth) > 0.9999).all()
    assert (cosine(first, truth) > 0).all()  # the loss has seen the other logits
    assert "twin" in fast.summary()


def test_code_that_asks_how_many_samples_there_are_raises_no_alarm_of_old_weights() -> None:
    def first(logits: Tensor, _: Tensor) -> Tensor:
        return logits[:, 0].sum()

    net, (x, y) = ByNumber().eval(), batch(12)
    fast = FastAttackModel(net, dtype=torch.bfloat16)
    for _ in range(2):
        assert cosine(input_gradient(fast, x, y, first), input_gradient(net, x, y, first)).median() > 0.98


@DTYPES
def test_code_that_asks_for_the_dtype_of_half_precision_weights(dtype: torch.dtype) -> None:
    net, (x, y) = InItsOwnDtype().eval().bfloat16(), batch()
    fast = FastAttackModel(net, dtype=dtype)
    with pytest.warns(FastAttackWarning, match=r"own weights .* cosine of .* with those in float32.*#not-folded"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(net, x, y)) > 0.95).all()


@DTYPES
def test_a_model_in_half_precision_whose_code_does_not_ask_raises_no_alarm(dtype: torch.dtype) -> None:
    net, (x, y) = small_net().eval().bfloat16(), batch()
    found = input_gradient(FastAttackModel(net, dtype=dtype), x, y)
    assert (cosine(found, input_gradient(net.float(), x, y)) > 0.95).all()


class WithoutDirection(nn.Module):
    """A gradient that is zero in every dtype, that is zero in half precision, or that is rounding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = attackable_net(), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rounds":
            x = (x * 255).round() / 255
        logits: Tensor = self.net(x)
        return {"rounds": logits, "saturates": torch.sigmoid(logits * 1e4), "cancels": logits - logits.mean(0)}[
            self.kind
        ]


@DTYPES
@pytest.mark.filterwarnings("ignore:.*one loss scale serves the whole call")
@pytest.mark.parametrize("kind", ["rounds", "saturates", "cancels"])
def test_what_has_no_direction_in_half_precision_raises_no_alarm(kind: str, dtype: torch.dtype) -> None:
    net, (x, y) = WithoutDirection(kind).eval().bfloat16(), batch()
    fast = FastAttackModel(net, dtype=dtype)
    input_gradient(fast, x.bfloat16(), y)
    assert "differs from the wrapped model" not in fast.summary()


def test_a_model_that_makes_modules_later_is_told_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"expected a model that has made all its modules, got .* run the model once"):
        FastAttackModel(MadeLate().eval())(batch()[0].requires_grad_())
    net = MadeLate().eval()
    net(batch()[0])
    assert FastAttackModel(net)(batch()[0].requires_grad_()).shape == (6, 10)


class Beside(nn.Module):
    """Returns something without entries, or of another length, beside the logits."""

    def __init__(self, *, empty: bool) -> None:
        super().__init__()
        self.net, self.empty = small_net(), empty

    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        return (logits, logits[:, :0]) if self.empty else (logits, logits[logits[:, 0] > 1e9])


@DTYPES
@pytest.mark.parametrize("empty", [True, False], ids=["no entries", "no rows"])
def test_outputs_without_entries(empty: bool, dtype: torch.dtype) -> None:
    net, (x, y) = Beside(empty=empty).eval(), batch()
    found = input_gradient(lambda x: FastAttackModel(net, dtype=dtype)(x)[0], x, y)
    assert (cosine(found, input_gradient(net.net, x, y)) > 0.98).all()
