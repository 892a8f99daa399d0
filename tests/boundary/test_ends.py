"""Where half precision ends: which layers are found, what follows them, and where gradients are scaled."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from fastadv_adapters.boundary import Ends

HALVES = [torch.bfloat16, torch.float16]
Loss = Callable[[Any], Tensor]


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class Head(Features):
    """A head, and whatever a subclass puts behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 10)

    def behind(self, logits: Tensor, x: Tensor) -> Any:
        return logits

    def forward(self, x: Tensor) -> Any:
        return self.behind(self.head(super().forward(x)), x)


class Softmax(Head):
    def behind(self, logits: Tensor, x: Tensor) -> Tensor:
        return (logits * 20).softmax(1)


class WritesInPlace(Head):
    def behind(self, logits: Tensor, x: Tensor) -> Tensor:
        logits.mul_(3)
        logits += 1
        return logits.tanh()


class SeesTheInput(Head):
    def behind(self, logits: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(logits) + x.flatten(1).pow(2).mean(1, keepdim=True)


class TwoHeads(Head):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        features = Features.forward(self, x)
        return {"logits": self.head(features).softmax(1), "aux": self.other(features).sigmoid().mean()}


class Twice(Head):
    """The head is called on two views."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(super().forward(x), 1) + torch.softmax(super().forward(x.flip(3)), 1)


class Product(Head):
    """A product of other code follows."""

    def behind(self, logits: Tensor, x: Tensor) -> Tensor:
        return F.normalize(logits, dim=1) @ torch.eye(10, dtype=logits.dtype)[:, :6] * 50


class Recurrent(Head):
    """The head reads what it has given: no call of it is the last but one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 32)

    def behind(self, logits: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.head(logits.tanh()))


class Gated(Head):
    """The head weighs what the layer before it gives: a last layer behind which another last layer comes."""

    def forward(self, x: Tensor) -> Tensor:
        features = Features.forward(self, x)
        weights: Tensor = self.head(features).softmax(1)
        return weights * features[:, :10]


class WithFeatures(Head):
    def forward(self, x: Tensor) -> Any:
        features = Features.forward(self, x)
        return {"logits": self.head(features), "features": features}


class SoftmaxInHook(Head):
    def __init__(self) -> None:
        super().__init__()
        self.head.register_forward_hook(lambda module, inputs, output: (output * 20).softmax(1))


MODELS = [
    Head,
    Softmax,
    WritesInPlace,
    SeesTheInput,
    TwoHeads,
    Twice,
    Product,
    Recurrent,
    Gated,
    WithFeatures,
    SoftmaxInHook,
]


def weighted(output: Any) -> Tensor:
    tensors = list(output.values()) if isinstance(output, dict) else [output]
    return torch.stack([(t.double() * torch.arange(1, t.numel() + 1).view(t.shape).cos()).sum() for t in tensors]).sum()


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(weighted(model(x)), x)[0].flatten(1)


def images() -> Tensor:
    return torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def ends_of(fast: FastAttackModel) -> Ends | None:
    (kind,) = fast._networks.kinds.values()
    return kind.rows.ends


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_gradients_are_those_of_the_model(kind: type[Head], dtype: torch.dtype) -> None:
    model, x = kind().eval(), images()
    fast = FastAttackModel(model, dtype=dtype)
    truth = gradient(copy.deepcopy(model).double(), x.double())
    for _ in range(2):
        assert (F.cosine_similarity(gradient(fast, x).double(), truth) > 0.98).all()
    assert fast.dtype == dtype
    assert [kind.dtype for kind in fast._networks.kinds.values()] == [dtype]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Head, Ends(frozenset({"head"}), 1, cut=False)),
        (Softmax, Ends(frozenset({"head"}), 1)),
        (TwoHeads, Ends(frozenset({"head", "other"}), 2)),
        (Twice, Ends(frozenset({"head"}), 2)),
        (Product, Ends(frozenset({"head"}), 1, alone=False)),
        (Recurrent, None),
        (Gated, Ends(frozenset({"body.1", "head"}), 2, upper=frozenset({"head"}))),
        (WithFeatures, Ends(frozenset({"body.1", "head"}), 2, upper=frozenset({"head"}))),
        (SoftmaxInHook, Ends(frozenset({"head"}), 1)),
    ],
)
def test_the_last_matrix_layers_are_found(kind: type[Head], expected: Ends | None) -> None:
    fast = FastAttackModel(kind().eval(), dtype=torch.bfloat16)
    gradient(fast, images())
    assert ends_of(fast) == expected


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_last_linear_layer_is_computed_and_followed_in_full_precision(dtype: torch.dtype) -> None:
    model, x = Head().eval(), images()
    fast = FastAttackModel(model, dtype=dtype, decisions="fast")
    gradient(fast, x)
    head = fast._networks.folded.network.get_submodule("head")
    assert head.weight.dtype == torch.float32
    logits = fast(x.clone().requires_grad_()).detach()
    assert (logits != logits.to(dtype).float()).any(), "numbers that half precision does not have"
    with torch.no_grad():
        model.head.weight.mul_(-2)
        torch.testing.assert_close(fast(x), model(x), rtol=0.05, atol=0.05)
    assert torch.equal(head.weight, model.head.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_last_convolution_that_gives_the_logits_is_computed_in_full_precision(dtype: torch.dtype) -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model, x = nn.Sequential(body, nn.Conv2d(8, 10, 1), nn.Flatten()).eval(), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, dtype=dtype, decisions="fast")
    gradient(fast, x)
    head = fast._networks.folded.network[1]  # type: ignore[index]
    assert torch.equal(head.weight, model[1].weight)  # type: ignore[arg-type]
    logits = fast(x.clone().requires_grad_()).detach()
    assert (logits != logits.to(dtype).float()).any(), "numbers that half precision does not have"
    torch.testing.assert_close(logits, model(x).detach(), rtol=0.05, atol=0.05)


def test_gradients_below_the_range_of_float32_pass_the_upper_part() -> None:
    model, x = Softmax().eval(), images()
    fast = FastAttackModel(model, dtype=torch.float16, logits_dtype=torch.float64)
    found = []
    for tiny in (1.0, 1e-60):
        leaf = x.clone().requires_grad_()
        rows = torch.autograd.grad(weighted(fast(leaf)) * tiny, leaf)[0].flatten(1)
        found.append(rows / rows.abs().amax(1, keepdim=True))
    assert (F.cosine_similarity(found[0], found[1]) > 0.9999).all()


def test_a_number_scales_once() -> None:
    model, x = SeesTheInput().eval(), images()
    fast = FastAttackModel(model, dtype=torch.bfloat16, loss_scale=64.0)
    torch.testing.assert_close(gradient(fast, x), gradient(model, x), rtol=0.05, atol=0.02)


def test_a_model_that_asks_for_its_own_gradient_is_not_cut() -> None:
    class Energy(Head):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                energy = super().forward(x).logsumexp(1).sum()
                (slope,) = torch.autograd.grad(energy, x, create_graph=True)
            return slope.flatten(1)[:, :10]

    model, x = Energy().eval(), images()
    truth = gradient(copy.deepcopy(model).double(), x.double())
    assert (F.cosine_similarity(gradient(FastAttackModel(model, dtype=torch.bfloat16), x).double(), truth) > 0.9).all()
