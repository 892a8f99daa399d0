"""Winograd's algorithm in the place of PyTorch's convolution: the same numbers, and only where it can compute them."""

import copy
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.kernels import filters, prepacked, winograd
from tests.kernels.test_shapes import DescendsItself, step
from tests.support.tools import settle

SIZES = [(8, 8), (7, 9), (4, 3), (3, 3), (5, 14)]
PLACES = [
    *itertools.product([1], [0, 1, 2, (0, 2), (2, 1)], [*SIZES]),
    *itertools.product([2], [1], [*SIZES, (6, 12), (1, 2)]),
    *[(1, 1, (1, 1)), (1, 2, (1, 2))],
]
"""Stride, padding, size of the input."""


def layer_of(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, **options).requires_grad_(False)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def exact(layer: nn.Conv2d, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient in float64."""
    leaf, double = x.double().requires_grad_(), copy.deepcopy(layer).double()
    output: Tensor = double(leaf)
    return output.detach(), torch.autograd.grad(output, leaf, grad.double())[0]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """It pays for every layer that it can compute; collects the layers whose weights were transformed."""
    transform, transformed = winograd.transform, list[nn.Module]()

    def noted(layer: nn.Conv2d, *args: Any) -> Any:
        transformed.append(layer)
        return transform(layer, *args)

    monkeypatch.setattr(prepacked, "is_onednn", lambda *args: True)
    monkeypatch.setattr(prepacked, "LEAST", 0)
    monkeypatch.setattr(winograd, "ROWS", 0)
    monkeypatch.setattr(winograd, "ENOUGH", {1: 0.0, 2: 0.0})
    monkeypatch.setattr(winograd, "transform", noted)
    return transformed


@pytest.fixture(params=[True, False], ids=["batched_products", "grouped_convolution"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way to multiply, whatever the processor is."""
    monkeypatch.setattr(winograd, "HAS_FAST_MKL", request.param)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("stride", "padding", "size"), PLACES, ids=str)
def test_output_and_gradient(stride: int, padding: Any, size: tuple[int, int], bias: bool) -> None:
    layer, x = layer_of(6, 10, stride=stride, padding=padding, bias=bias), channels_last(3, 6, *size)
    weights = winograd.transform(layer, x.shape, layer.weight)
    output = weights.convolve(x)
    grad = torch.randn_like(output)
    for found, wanted in zip(
        (output, weights.gradient(grad, x.shape, layer.weight)), exact(layer, x, grad), strict=True
    ):
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("samples", [1, 4, 7, 8])
def test_samples_in_blocks(samples: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "ROWS", 16)
    monkeypatch.setattr(winograd, "_ENTRIES", 0)
    layer, x = layer_of(4, 4, stride=stride, padding=1), channels_last(samples, 4, 8, 8)  # two or four samples a block
    weights = winograd.transform(layer, x.shape, layer.weight)
    output = weights.convolve(x)
    grad = torch.randn_like(output)
    for found, wanted in zip(
        (output, weights.gradient(grad, x.shape, layer.weight)), exact(layer, x, grad), strict=True
    ):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(("channels", "stride"), [(160, 1), (512, 1), (320, 2)])
def test_it_rounds_as_pytorch_does(channels: int, stride: int) -> None:
    layer = layer_of(channels, channels, stride=stride, padding=1)
    x = channels_last(4, channels, 8, 8).relu()
    weights, leaf = winograd.transform(layer, x.shape, layer.weight), x.clone().requires_grad_()
    output, theirs = weights.convolve(x), layer(leaf)
    grad = torch.randn_like(output)
    wanted = exact(layer, x, grad)
    (their_gradient,) = torch.autograd.grad(theirs, leaf, grad)
    least = 1e-6  # some kernels of PyTorch's round less than others
    assert relative(output, wanted[0]) < 2 * relative(theirs.detach(), wanted[0]) + least
    found = weights.gradient(grad, x.shape, layer.weight)
    assert relative(found, wanted[1]) < 2 * relative(their_gradient, wanted[1]) + least


def cook_toom(points: Sequence[float], outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """A', G and B' for so many outputs of a kernel of 3, with infinity as a point more, in float64."""
    finite, last = torch.tensor(points, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[2:]
    a = torch.cat([finite.pow(torch.arange(outputs)[:, None]), torch.eye(outputs, dtype=torch.float64)[:, -1:]], dim=1)
    others = [[q for q in points if q != p] for p in points]
    products = torch.tensor([math.prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)])
    g = torch.cat([finite[:, None].pow(torch.arange(3)) / products[:, None], last])
    rows = [np.poly(roots)[::-1] for roots in [*others, points]]
    b = torch.from_numpy(np.stack([np.pad(row, (0, len(points) + 1 - len(row))) for row in rows]))
    return a, g, b


def rounding(points: Sequence[float]) -> float:
    """Error in float32 of tiles of four rows at these points, and two columns."""
    generator = torch.Generator().manual_seed(0)
    d, g = torch.rand(256, 50, 6, 4, generator=generator), torch.randn(16, 256, 3, 3, generator=generator)
    (a, down, b), (a2, across, b2) = cook_toom(points, 4), cook_toom((0.0, 1.0, -1.0), 2)

    def compute(dtype: torch.dtype) -> Tensor:
        weight = torch.einsum("ai,ocij,bj->aboc", down, g.double(), across).to(dtype)
        tiles = torch.einsum("ai,ctij->ctaj", b.to(dtype), d.to(dtype))
        product = weight @ torch.einsum("bj,ctaj->abct", b2.to(dtype), tiles)
        return torch.einsum("yb,xbot->xyot", a2.to(dtype), torch.einsum("xa,abot->xbot", a.to(dtype), product))

    return relative(compute(torch.float32), compute(torch.float64))


def test_the_points_round_less_than_the_usual_ones() -> None:
    chosen = (0.0, filters.A, -filters.A, filters.B, -filters.B)
    torch.testing.assert_close(torch.tensor(filters.FOUR.matrix, dtype=torch.float64), cook_toom(chosen, 4)[1])
    assert rounding(chosen) < 0.85 * rounding((0.0, 1.0, -1.0, 2.0, -2.0))


@pytest.mark.parametrize(
    ("layer", "shape", "pays"),
    [
        (layer_of(256, 256, padding=1), (32, 256, 8, 8), True),
        (layer_of(160, 160, padding=1), (1, 160, 32, 32), True),
        (layer_of(64, 64, padding=1), (32, 64, 32, 32), False),
        (layer_of(256, 256, padding=1), (1, 256, 8, 8), False),
        (layer_of(256, 256, padding=3), (32, 256, 8, 8), False),
        (layer_of(256, 512, stride=2, padding=1), (32, 256, 8, 8), True),
        (layer_of(160, 320, stride=2, padding=1), (32, 160, 32, 32), False),
        (layer_of(256, 512, stride=2), (32, 256, 8, 8), False),
        (layer_of(256, 512, stride=(1, 2), padding=1), (32, 256, 8, 8), False),
        (layer_of(512, 512, stride=3, padding=1), (32, 512, 12, 12), False),
        (layer_of(256, 256, dilation=2, padding=2), (32, 256, 8, 8), False),
        (layer_of(512, 512, groups=2, padding=1), (32, 512, 8, 8), False),
        (nn.Conv2d(256, 256, 1), (32, 256, 8, 8), False),
        (nn.Conv2d(256, 256, (3, 1)), (32, 256, 8, 8), False),
        (layer_of(256, 256, padding=1).bfloat16(), (32, 256, 8, 8), False),
    ],
    ids=[
        "256",
        "160",
        "64",
        "few_tiles",
        "padded",
        "256_strided",
        "160_strided",
        "strided_unpadded",
        "strides",
        "stride_3",
        "dilated",
        "grouped",
        "1x1",
        "3x1",
        "bfloat16",
    ],
)
def test_where_it_pays(layer: nn.Conv2d, shape: tuple[int, ...], pays: bool) -> None:
    assert winograd.pays(layer, torch.Size(shape)) is pays


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3)),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.SiLU(), nn.Conv2d(6, 5, 3, padding=2)),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, padding=1), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 5, 3)),
    ],
    ids=["folded", "kept_shape", "strided"],
)
def test_a_network_on_it(make: Callable[[], nn.Module], everywhere: list[nn.Module]) -> None:
    net, x = settle(nn.Sequential(make(), nn.Flatten())).eval(), torch.randn(5, 4, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    for _ in range(3):
        with torch.no_grad():
            next(net.parameters()).mul_(2)
        for _ in range(2):
            for found, wanted in zip(step(fast, x), step(net, x), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    own = {id(layer) for layer in fast._networks.folded.network.modules()}
    assert sum(id(layer) in own for layer in everywhere) == 2 * 3  # two layers, once for each update
    assert not fast._networks.notes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_only_in_float32(dtype: torch.dtype, everywhere: list[nn.Module]) -> None:
    net, x = settle(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten())), torch.randn(5, 4, 8, 8)
    fast = FastAttackModel(net, dtype=dtype, engine="eager")
    for found, wanted in zip(step(fast, x), step(net, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert fast._networks.folded.network[0] not in everywhere  # type: ignore[index]


def test_a_batch_too_small_for_it_after_a_large_one(
    everywhere: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = settle(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten())), torch.randn(9, 4, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    monkeypatch.setattr(winograd, "ROWS", 2 * 8 * 9)
    for samples in (9, 1, 5, 9, 1):
        for found, wanted in zip(step(fast, x[:samples]), step(net, x[:samples]), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    kept = fast._networks.folded.network[0].prepacked._kept[2]  # type: ignore[index]
    assert {way: type(weights) for way, weights in kept.items()} == {
        "winograd": winograd.Winograd,
        "laid out": prepacked.LaidOut,
    }


@pytest.mark.usefixtures("everywhere")
def test_a_broken_sample_breaks_no_other() -> None:
    layer, x = layer_of(4, 4, padding=1), channels_last(6, 4, 8, 8)
    x[2, 1, 3, 3], x[4, 0, 0, 0] = torch.nan, torch.inf
    output = winograd.transform(layer, x.shape, layer.weight).convolve(x)
    whole = [0, 1, 3, 5]
    torch.testing.assert_close(output[whole], layer(x[whole]), rtol=1e-4, atol=1e-5)
    assert not output[2].isfinite().all()
    assert not output[4].isfinite().all()


@pytest.mark.usefixtures("everywhere")
def test_threads_at_the_same_time() -> None:
    net = settle(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()))
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    batches = [torch.randn(n, 8, 12, 12) for n in (3, 8, 5)]
    wanted, failed = [step(net, x) for x in batches], list[BaseException]()
    step(fast, batches[0])

    def work(x: Tensor, pair: Any) -> None:
        try:
            for _ in range(20):
                for found, right in zip(step(fast, x), pair, strict=True):
                    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.usefixtures("everywhere")
def test_first_used_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_scratch", winograd._Scratch())
    layer, x = layer_of(4, 4, padding=1), channels_last(3, 4, 8, 8)
    with torch.inference_mode():
        first = winograd.transform(layer, x.shape, layer.weight).convolve(x).clone()
    later = winograd.transform(layer, x.shape, layer.weight).convolve(x)
    torch.testing.assert_close(later, first, rtol=0, atol=0)
    later.add_(1)


def test_a_backward_pass_inside_the_model_is_differentiated_too(everywhere: list[nn.Module]) -> None:
    net, x = DescendsItself().eval(), torch.randn(3, 3, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    for _ in range(2):
        torch.testing.assert_close(step(fast, x), step(net, x), rtol=1e-4, atol=1e-5)
    assert everywhere
    assert not fast._networks.notes


def test_as_strong_an_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layers' own sizes."""
    monkeypatch.setattr(prepacked, "is_onednn", lambda *args: True)  # as with more threads, and on any processor
    net = settle(
        nn.Sequential(
            nn.Conv2d(3, 160, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(160, 160, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(160, 10),
        )
    )
    x = torch.rand(16, 3, 16, 16)
    labels = net(x).argmax(1)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    attack, reference = (SafePGD(model, eps=8 / 255, steps=5, random_start=False) for model in (fast, net))
    plain, ours = reference(x, labels), attack(x, labels)
    used = fast._networks.folded.network[2].prepacked._kept[2]  # type: ignore[index]
    assert list(used) == ["winograd"]
    losses = [nn.functional.cross_entropy(net(adversarial), labels) for adversarial in (ours, plain)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_where_matrix_products_are_lowered_it_is_not_used(everywhere: list[nn.Module]) -> None:
    net, x = settle(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten())), torch.randn(5, 4, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    leaf = x.clone().requires_grad_()
    begun, (_, wanted) = fast(leaf), step(net, x)
    assert everywhere
    everywhere.clear()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert not winograd.pays(layer_of(256, 256, padding=1), torch.Size((32, 256, 8, 8)))
        (gradient,) = torch.autograd.grad(begun.sin().sum(), leaf)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
        fast.update()
        for found, right in zip(step(fast, x), step(net, x), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not everywhere


def test_a_default_device_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_scratch", winograd._Scratch())
    layer, x = layer_of(4, 4, padding=1), channels_last(3, 4, 8, 8)
    weights = winograd.transform(layer, x.shape, layer.weight)
    with torch.device("meta"):
        output = weights.convolve(x)
    torch.testing.assert_close(output, layer(x), rtol=1e-4, atol=1e-5)


def test_an_image_too_large_for_the_cache_is_left_to_pytorch() -> None:
    assert not winograd.pays(layer_of(256, 256, padding=1), torch.Size((1, 256, 128, 128)))


@pytest.mark.parametrize("layout", ["channels_first", "expanded"])
def test_gradients_in_any_layout(layout: str) -> None:
    layer, x = layer_of(4, 6, padding=1), channels_last(3, 4, 8, 8)
    grad = torch.randn(3, 6, 8, 8) if layout == "channels_first" else torch.randn(1, 6, 1, 1).expand(3, 6, 8, 8)
    weights = winograd.transform(layer, x.shape, layer.weight)
    wanted = exact(layer, x, grad)[1].float()
    torch.testing.assert_close(weights.gradient(grad, x.shape, layer.weight), wanted, rtol=1e-5, atol=5e-6)


def test_where_it_fails_weights_are_laid_out(everywhere: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(winograd, "transform", refuse)
    net, x = settle(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten())), torch.randn(5, 4, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    for _ in range(3):
        for found, wanted in zip(step(fast, x), step(net, x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert list(fast._networks.folded.network[0].prepacked._kept[2]) == ["laid out"]  # type: ignore[index]
    assert not everywhere


def test_weights_of_an_update_do_not_fall_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that is still making the old ones does not leave them for later passes."""
    monkeypatch.setattr(prepacked, "is_onednn", lambda *args: True)
    monkeypatch.setattr(prepacked, "LEAST", 0)
    lay_out, layer, x = prepacked._lay_out, layer_of(4, 4), channels_last(3, 4, 8, 8)
    held = prepacked.Prepacked()

    def interrupted(*args: Any) -> Any:
        old = lay_out(*args)
        monkeypatch.setattr(prepacked, "_lay_out", lay_out)
        layer.weight.mul_(2)
        held.find(layer, x, layer.weight)
        return old

    monkeypatch.setattr(prepacked, "_lay_out", interrupted)
    held.find(layer, x, layer.weight)
    later = held.find(layer, x, layer.weight)
    assert later is not None
    torch.testing.assert_close(later.convolve(x), layer(x), rtol=1e-4, atol=1e-5)
