"""Convolutions that keep only the shape of their input: the same numbers as PyTorch's own, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison.memory import bytes_kept
from fastadv_adapters.folding import build as folding
from fastadv_adapters.kernels import shapes
from tests.support.engines import use_engine
from tests.support.tools import input_gradient, settle

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (6, 6)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (7, 6)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=(1, 2)), (6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (6, 6)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (6, 6)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (6, 6)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (6, 6)),
    "one_dimension": (lambda: nn.Conv1d(4, 6, 3), (9,)),
    "three_dimensions": (lambda: nn.Conv3d(4, 6, 2), (3, 3, 3)),
    "folded": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), (6, 6)),
}


def around(make: Callable[[], nn.Module]) -> nn.Module:
    """A network in which nobody else keeps what the layer reads."""
    return settle(nn.Sequential(nn.SiLU(), make(), nn.SiLU(), nn.Flatten()))


def step(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient."""
    leaf = x.clone().requires_grad_()
    output = net(leaf)
    return output.detach(), torch.autograd.grad(output.sin().sum(), leaf)[0]


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FastAttackModel]:
    """Makes fast models of PyTorch's own layers."""

    def make(net: nn.Module, **options: Any) -> FastAttackModel:
        with monkeypatch.context() as patch:
            patch.setattr(folding, "keep_shape_only", lambda part, kind: None)
            return FastAttackModel(net, **options)

    return make


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_bit_for_bit(
    name: str, dtype: torch.dtype, channels_last: bool, usual: Callable[..., FastAttackModel]
) -> None:
    make, size = LAYERS[name]
    net, x = around(make), 4 * torch.randn(3, 4, *size)
    options: Any = {"dtype": dtype, "channels_last": channels_last, "engine": "eager"}
    fast = FastAttackModel(net, **options)
    for found, wanted in zip(step(fast, x), step(usual(net, **options), x), strict=True):
        assert torch.equal(found, wanted)
    assert not fast._networks.notes


def test_a_convolution_keeps_no_input_that_nobody_else_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = around(lambda: nn.Conv2d(4, 6, 3)).eval(), torch.rand(2, 4, 8, 8)
    image, inner = 4 * 64 * 4, 6 * 36 * 4  # bytes; SiLU keeps its input
    options: Any = {"dtype": torch.float32, "engine": "eager", "channels_last": False}
    assert bytes_kept(FastAttackModel(net, **options), x) == (image + inner, {"SiLU": image + inner})
    monkeypatch.setattr(folding, "keep_shape_only", lambda part, kind: None)
    assert bytes_kept(FastAttackModel(net, **options), x).by_layer == {"Conv2d": image, "SiLU": image + inner}


def test_small_inputs_are_kept_which_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = around(lambda: nn.Conv2d(4, 6, 3)).eval(), torch.rand(2, 4, 8, 8)
    image, inner = 4 * 64, 6 * 36  # entries of a sample
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager", channels_last=False)
    for small, kept in ((2 * image, {}), (2 * image + 1, {"Conv2d": 4 * image})):
        monkeypatch.setattr(shapes, "SMALL", small)
        assert bytes_kept(fast, x).by_layer == {"SiLU": 4 * (image + inner)} | kept


class Image(Tensor):
    """As libraries of images have them."""


@pytest.mark.parametrize("first", [Tensor, Image])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_images_of_a_class_of_their_own(first: type[Tensor], dtype: torch.dtype) -> None:
    body = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net, x = settle(nn.Sequential(*body, nn.Linear(16, 10))).eval(), torch.rand(3, 3, 12, 12)
    fast = FastAttackModel(net, dtype=dtype, engine="eager")
    for kind in (first, Image, Tensor):
        found, wanted = (step(of, x.as_subclass(kind)) for of in (fast, net))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                ours.as_subclass(Tensor),
                theirs.as_subclass(Tensor),
                rtol=0.05,
                atol=0.01 if dtype.itemsize == 2 else 1e-5,
            )
    assert fast.dtype == dtype, fast.summary()


def test_behind_what_keeps_its_output_convolutions_are_pytorchs_own() -> None:
    net, x = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten()), torch.rand(2, 4, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager", channels_last=False)
    assert bytes_kept(fast, x).by_layer == {"ReLU": 4 * 64 * 4}
    network = fast._networks.folded.network
    assert type(network(x.requires_grad_()).grad_fn.next_functions[0][0]).__name__ == "ConvolutionBackward0"


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardtanh, nn.GELU, nn.Hardswish, nn.Mish, nn.ReLU, nn.LeakyReLU])
def test_between_convolutions_one_tensor_is_kept(activation: type[nn.Module]) -> None:
    pairs = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3, padding=1), activation())]
    net = nn.Sequential(*pairs, nn.Conv2d(4, 1, 8), nn.Flatten()).eval()
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    assert bytes_kept(fast, torch.rand(2, 4, 8, 8)).total == 3 * 4 * 64 * 4
    assert bytes_kept(net, torch.rand(2, 4, 8, 8)).total >= 4 * 4 * 64 * 4


@pytest.mark.parametrize("engine", ["eager", "compile", "cudagraph"])
def test_every_engine_runs_them(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, engine)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU6())
    net, x = settle(nn.Sequential(body, nn.Flatten(), nn.Linear(64, 5))).eval(), torch.rand(3, 3, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32)
    for found, wanted in zip(step(fast, x), step(net, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert fast.engine == engine, fast.summary()


# --- unusual backward passes ------------------------------------------------------------------------------------------


class DescendsItself(nn.Module):
    """Moves its input along the gradient of an inner network before it looks: a backward pass inside, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.SiLU(), nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 1, 3), nn.Softplus()
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Conv2d(3, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            start = x if x.requires_grad else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.inner(start).sum(), start, create_graph=True)
        out: Tensor = self.head(x - 3 * slope).flatten(1)
        return out


class Checkpointed(nn.Module):
    """Runs its layers again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.SiLU(), nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.LeakyReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.body, x, use_reentrant=False).flatten(1)
        return out


@pytest.mark.parametrize("make", [DescendsItself, Checkpointed])
def test_models_that_differentiate_or_recompute_are_right(make: Callable[[], nn.Module]) -> None:
    net, x = make().eval(), torch.randn(3, 3, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    for found, wanted in zip(step(fast, x), step(net, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not fast._networks.notes


def test_two_backward_passes_through_one_forward_pass() -> None:
    net = around(lambda: nn.Conv2d(4, 6, 3))
    fast, leaf = FastAttackModel(net, dtype=torch.float32), torch.rand(2, 4, 8, 8).requires_grad_()
    loss = F.softplus(fast(leaf)).sum()
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.any()


class Each(nn.Module):
    """A convolution of one image at a time, without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([self.conv(image) for image in F.silu(x)])
        out: Tensor = self.head(self.norm(h).flatten(1))
        return out


def test_a_convolution_of_a_lone_image_is_pytorchs_own() -> None:
    net, x = settle(Each()).eval(), torch.rand(3, 4, 6, 6)
    fast = FastAttackModel(net, dtype=torch.float32)
    for found, wanted in zip(step(fast, x), step(net, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not fast._networks.notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_device_is_not_asked(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 32, 7, stride=2), nn.Conv2d(32, 32, 3, stride=2, groups=32), nn.Flatten(), nn.Linear(800, 10))
    ).eval()
    x, y = torch.rand(4, 3, 28, 28), torch.arange(4)
    expected = input_gradient(FastAttackModel(net, dtype=dtype), x, y)
    with torch.device("meta"):
        found = input_gradient(FastAttackModel(net, dtype=dtype), x, y)
    assert torch.equal(found, expected)
