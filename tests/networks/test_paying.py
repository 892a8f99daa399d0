"""``dtype="auto"``: a rule from the work of the first gradient pass, the same every time."""

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.modules import precision
from fastadv_adapters.networks.paying import LEAST, Choice, Work
from tests.support.tools import input_gradient

HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def bfloat16_in_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: True)
    monkeypatch.setitem(LEAST, "matrix product", 3e6)  # not that of the processor that runs this


def linear(width: int = 512) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)).eval()


def convolutional(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 4)).eval()


def asked(fast: FastAttackModel, samples: int) -> torch.dtype:
    x = torch.rand(samples, 1, 8, 8)
    assert input_gradient(fast, x, torch.zeros(samples, dtype=torch.long)).abs().amax() > 0
    return fast.dtype


@pytest.mark.parametrize(
    ("build", "samples", "dtype"),
    [
        (lambda: linear(), 16, FULL),  # (512 + 80) * 64 * 16 / 2 = 0.3 million on average
        (lambda: linear(), 256, HALF),
        (lambda: convolutional(8), 16, FULL),  # 8 * 9 * 64 * 16 = 0.07 million
        (lambda: convolutional(64), 64, HALF),
    ],
)
def test_auto_takes_half_precision_if_products_are_large(
    build: Callable[[], nn.Module], samples: int, dtype: torch.dtype
) -> None:
    fast = FastAttackModel(build())
    assert fast.dtype == HALF, "until something is known of the work"
    assert "until the first gradient pass" in fast.summary()
    assert asked(fast, samples) == dtype
    enough = "enough for half precision" if dtype == HALF else "too few for half precision"
    assert f"{str(dtype).removeprefix('torch.')} (a " in fast.summary()
    assert enough in fast.summary()


@pytest.mark.parametrize("auto_update", [True, False])
def test_the_choice_is_kept_until_the_structure_changes(auto_update: bool) -> None:
    model = linear()
    fast = FastAttackModel(model, auto_update=auto_update)
    with torch.no_grad():
        fast(torch.rand(256, 1, 8, 8))  # many samples without a gradient decide nothing
    assert asked(fast, 16) == FULL
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert asked(fast.update(), 256) == FULL
    model.append(nn.Linear(10, 10))
    assert asked(fast.update(), 256) == HALF


def test_a_dtype_that_was_asked_for_is_obeyed() -> None:
    assert asked(FastAttackModel(linear(), dtype=HALF), 1) == HALF
    assert asked(FastAttackModel(linear(), dtype=FULL), 256) == FULL


def test_a_view_and_its_model_choose_once_together() -> None:
    fast = FastAttackModel(linear())
    assert asked(fast.view(decisions="exact"), 256) == HALF
    assert asked(fast, 1) == HALF


def test_nothing_is_counted_if_nothing_is_to_choose() -> None:
    for choice in (Choice(FULL, FULL, torch.device("cpu")), Choice("auto", torch.float16, torch.device("cuda"))):
        assert not choice.open
        assert choice.settle(1)


@pytest.mark.parametrize(
    ("layer", "shape", "found"),
    [
        (nn.Conv2d(3, 4, 3, groups=1), (2, 3, 8, 8), {"convolution": [2 * 4 * 36 * 27], "matrix product": []}),
        (nn.Conv1d(4, 4, 3, groups=4), (2, 4, 8), {"convolution": [2 * 4 * 6 * 3], "matrix product": []}),
        (nn.ConvTranspose2d(3, 4, 3), (2, 3, 8, 8), {"convolution": [2 * 3 * 64 * 36], "matrix product": []}),
        (nn.Linear(5, 7), (2, 3, 5), {"convolution": [], "matrix product": [2 * 3 * 5 * 7]}),
        (nn.Linear(5, 7, bias=False), (2, 5), {"convolution": [], "matrix product": [2 * 5 * 7]}),
    ],
)
def test_multiplications_are_counted(layer: nn.Module, shape: tuple[int, ...], found: dict[str, list[int]]) -> None:
    with torch.no_grad(), Work() as work:
        layer(torch.rand(shape))
    assert work.found == found


def test_layers_that_run_fused_without_gradient_are_counted_and_those_never_seen_stay_in_half_precision() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, batch_first=True).eval().requires_grad_(False)
    choice = Choice("auto", HALF, torch.device("cpu"))
    with torch.no_grad(), choice.counting([torch.rand(2, 1)]):
        layer(torch.rand(2, 5, 16))
    assert torch.backends.mha.get_fastpath_enabled()
    assert not choice.settle(2)
    choice = Choice("auto", HALF, torch.device("cpu"))
    with torch.no_grad(), choice.counting([torch.rand(2, 1)]):
        torch.rand(2, 5).relu()
    assert choice.settle(2)
    assert min(LEAST.values()) > 0


def sized() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_passes_before_the_first_gradient_decide_nothing_whatever_their_shape() -> None:
    fast = FastAttackModel(sized())
    with torch.no_grad():
        fast(torch.rand(16, 1, 64, 64))
    assert asked(fast, 16) == FULL  # 32 * 9 * 64 * 16 = 0.3 million
    fast = FastAttackModel(sized())
    torch.func.vmap(lambda x: fast(x[None])[0])(torch.rand(16, 1, 8, 8))
    assert asked(fast, 16) == FULL


def test_looks_that_overlap_leave_the_setting_for_attention_as_it_was() -> None:
    before, inside, done = torch.backends.mha.get_fastpath_enabled(), threading.Event(), threading.Event()

    def look(*calls: Callable[[], object]) -> None:
        with Choice("auto", HALF, torch.device("cpu")).counting([torch.rand(2, 1)]):
            for call in calls:
                call()

    def second() -> None:
        look(inside.set, lambda: done.wait(2))

    other = threading.Thread(target=second)
    try:
        look(other.start, lambda: inside.wait(0.2))  # the other one begins in the middle of this one
        done.set()
        other.join()
        assert torch.backends.mha.get_fastpath_enabled() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
def test_a_copy_keeps_what_is_settled(copied: Callable[[FastAttackModel], FastAttackModel]) -> None:
    fast = FastAttackModel(linear())
    assert asked(copied(fast), 256) == HALF, "nothing was"
    assert asked(fast, 16) == FULL
    again = copied(fast)
    assert again.dtype == FULL
    assert asked(copied(again), 256) == FULL
    assert "too few for half precision" in again.summary()
    again.wrapped.append(nn.Linear(10, 10))  # type: ignore[operator]
    assert asked(again, 256) == HALF, "another structure"
