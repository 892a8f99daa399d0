"""Convolutions with weights laid out ahead: the same numbers as PyTorch's own, and laid out once per update."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison.memory import bytes_kept
from fastadv_adapters.folding import build
from fastadv_adapters.kernels import prepacked
from fastadv_adapters.kernels.calls import is_onednn
from tests.kernels.test_shapes import DescendsItself, step
from tests.support.tools import settle

LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), 8),
    "padded": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), 8),
    "over_padded": (lambda: nn.Conv2d(4, 6, 3, padding=3), 8),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), 8),
    "strided_to_the_edge": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), 9),
    "unread_edge": (lambda: nn.Conv2d(4, 6, 3, stride=3), 10),
    "uneven": (lambda: nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1)), 11),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), 9),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), 8),
    "pointwise_strided": (lambda: nn.Conv2d(4, 6, 1, stride=2), 8),
    "folded": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), 8),
}


@pytest.fixture(autouse=True)
def packs(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Weights of any size are laid out; collects the layers whose weights were, for forward passes."""
    lay_out, packed = prepacked._lay_out, list[nn.Module]()

    def noted(layer: nn.Conv2d, *args: Any) -> Any:
        packed.append(layer)
        return lay_out(layer, *args)

    # PyTorch runs oneDNN on small batches only with more than one thread.
    monkeypatch.setattr(prepacked, "is_onednn", lambda *args: True)
    monkeypatch.setattr(prepacked, "LEAST", 0)
    monkeypatch.setattr(prepacked, "_lay_out", noted)
    return packed


def once(packs: list[nn.Module]) -> None:
    """Each layer that was laid out was so once, also those of the self-check; and forget of it."""
    assert packs
    assert len({id(layer) for layer in packs}) == len(packs)
    packs.clear()


def around(make: Callable[[], nn.Module]) -> nn.Module:
    return settle(nn.Sequential(make(), nn.SiLU(), nn.Flatten()))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_numbers(
    name: str, dtype: torch.dtype, packs: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, size = LAYERS[name]
    net, x = around(make), 4 * torch.randn(3, 4, size, size)
    monkeypatch.setattr(build, "is_product", lambda part: False)  # as of one that is not the last
    fast = FastAttackModel(net, dtype=dtype, engine="eager")
    with monkeypatch.context() as without:
        without.setattr(prepacked, "_fits", lambda *args: False)
        first = step(fast, x)
    assert not packs
    for _ in range(2):
        output, gradient = step(fast, x)
        torch.testing.assert_close(output, first[0])
        torch.testing.assert_close(gradient, first[1], rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    assert len(packs) == 1


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (1, 4, 8, 8), (5, 4, 11, 6)], ids=str)
def test_weights_laid_out_for_one_shape_are_right_for_others(shape: tuple[int, ...], packs: list[nn.Module]) -> None:
    net = around(lambda: nn.Conv2d(4, 6, 3, stride=2))
    fast, x = FastAttackModel(net, dtype=torch.float32, engine="eager"), torch.randn(shape)
    for _ in range(3):
        step(fast, torch.randn(3, 4, 8, 8))
    once(packs)
    for found, wanted in zip(step(fast, x), step(net, x), strict=True):
        torch.testing.assert_close(found, wanted)
    assert not packs


def test_laid_out_once_per_update_and_by_the_pass_that_needs_it(packs: list[nn.Module]) -> None:
    net, x = around(lambda: nn.Conv2d(4, 6, 3)), torch.randn(3, 4, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    layer = fast._networks.folded.network[0]  # type: ignore[index]
    for _ in range(3):
        with torch.no_grad():
            next(net.parameters()).mul_(2)
        fast.update()
        fast(x.clone().requires_grad_())
        once(packs)
        (packed,) = layer.prepacked._kept[2].values()
        laid_out_backward = [packed.backward is not None]
        for _ in range(3):
            for found, wanted in zip(step(fast, x), step(net, x), strict=True):
                torch.testing.assert_close(found, wanted)
        assert layer.prepacked._kept[2] == {"laid out": packed}
        assert [*laid_out_backward, packed.backward is not None] == [False, True]
        assert not packs


def test_what_does_not_change_is_not_laid_out_again(packs: list[nn.Module]) -> None:
    net, x = around(lambda: nn.Conv2d(4, 6, 3)), torch.randn(3, 4, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    step(fast, x)
    once(packs)
    for _ in range(3):
        step(fast, x)
    assert not packs


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (lambda: nn.Conv2d(4, 8, 3, groups=2), {}),
        (lambda: nn.Conv2d(4, 8, 3), {"channels_last": False}),
        (lambda: nn.Conv2d(4, 8, 3), {"dtype": torch.float64}),
        (lambda: nn.Conv2d(4, 8, 3, padding="same"), {}),
        (lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 8, (1, 3, 3))), {}),
    ],
    ids=["groups", "contiguous", "float64", "same", "three_dimensions"],
)
def test_other_convolutions_are_pytorchs_own(
    layer: Callable[[], nn.Module], options: dict[str, Any], packs: list[nn.Module]
) -> None:
    net, x = around(layer), torch.randn(3, 4, 8, 8)
    fast = FastAttackModel(net, **{"dtype": torch.float32, "engine": "eager", **options})
    for _ in range(3):
        found = step(fast, x)
    torch.testing.assert_close(found, step(net, x), rtol=1e-4, atol=1e-5)
    assert not packs


def test_small_weights_are_left_to_pytorch(packs: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = around(lambda: nn.Conv2d(4, 6, 3)), torch.randn(3, 4, 8, 8)
    monkeypatch.setattr(prepacked, "LEAST", 4 * 6 * 9 + 1)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    for _ in range(3):
        step(fast, x)
    assert not packs


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), AttributeError("no operator")], ids=repr)
def test_where_onednn_refuses_pytorchs_convolution_is_run(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = list[int]()

    def refuse(*args: Any) -> None:
        tries.append(1)
        raise error

    monkeypatch.setattr(prepacked, "_lay_out", refuse)
    net, x = around(lambda: nn.Conv2d(4, 6, 3)), torch.randn(3, 4, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    step(fast, x)  # the self-check tries on a network of its own
    tries.clear()
    for _ in range(4):
        torch.testing.assert_close(step(fast, x), step(net, x))
    assert not tries


def test_nothing_more_is_kept_for_the_backward_pass() -> None:
    net, x = around(lambda: nn.Conv2d(4, 6, 3)), torch.randn(3, 4, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    before = bytes_kept(fast, x)
    network, leaf = fast._networks.folded.network, x.contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        step(fast, x)
    assert type(network[0](leaf.requires_grad_()).grad_fn).__name__ == "ConvolveBackward"  # type: ignore[index]
    assert bytes_kept(fast, x) == before


def test_a_backward_pass_inside_the_model_is_differentiated_too(packs: list[nn.Module]) -> None:
    net, x = DescendsItself().eval(), torch.randn(3, 3, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    for _ in range(3):
        torch.testing.assert_close(step(fast, x), step(net, x), rtol=1e-4, atol=1e-5)
    once(packs)
    assert not fast._networks.notes


def test_pytorch_is_asked_what_it_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    layer, x = nn.Conv2d(64, 128, 3), torch.rand(8, 64, 16, 16)
    assert is_onednn(layer, x, layer.weight) == torch.backends.mkldnn.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the flags mention graphics processors that are not there
        with torch.backends.mkldnn.flags(enabled=False):
            chosen = is_onednn(layer, x, layer.weight)
    assert not chosen


def test_folded_weights_are_rounded_once_from_another_half_precision() -> None:
    conv, norm = nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128)
    net = settle(nn.Sequential(conv, norm, nn.Flatten())).eval().half()
    fast = FastAttackModel(net, dtype=torch.bfloat16, engine="eager")
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.float() + norm.eps) * norm.weight
    wanted = (conv.weight * scale.view(-1, 1, 1, 1)).bfloat16()
    found = fast._networks.folded.network[0].weight  # type: ignore[index]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, check_stride=False)


def test_weights_that_are_laid_out_ahead_hold_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "LEAST", 0)
    monkeypatch.setattr(prepacked, "is_onednn", lambda *args: True)
    held, layer = prepacked.Prepacked(), nn.Conv2d(4, 6, 3).requires_grad_(False)
    x = torch.rand(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    packed = held.find(layer, x, layer.weight)
    assert packed is not None
    assert layer not in vars(packed).values()
