"""Compiled code gives what the eager network gives, with few compilations, and says so where it cannot."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from fastadv_adapters import FastAttackModel
from fastadv_adapters.engines import compiled
from fastadv_adapters.modules.notices import FastAttackWarning
from tests.engines.test_replay import MODELS, Branching, change, eager
from tests.support.engines import use_engine
from tests.support.tools import batch, cosine, input_gradient, settle, small_net
from tests.zoo.between import BatchNormAct

pytestmark = pytest.mark.long

FLOAT32: Any = {"dtype": torch.float32}


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


@pytest.fixture
def compilations() -> Callable[[], int]:
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", MODELS)
def test_compiled_is_right_and_compiles_once_per_shape(name: str, compilations: Callable[[], int]) -> None:
    net = MODELS[name]().eval()
    fast, plain = FastAttackModel(net, engine="compile", **FLOAT32), eager(net)
    (x, y), (shorter, labels) = batch(6), batch(3)
    for _ in range(2):
        assert (cosine(input_gradient(fast, x, y), input_gradient(plain, x, y)) > 0.9999).all()
        torch.testing.assert_close(fast.view(decisions="fast")(x), plain(x), rtol=1e-4, atol=1e-4)
        assert compilations() == 1
        change(net)  # and no compilation after the update
    if name == "residual":
        assert (cosine(input_gradient(fast, shorter, labels), input_gradient(plain, shorter, labels)) > 0.9999).all()
        assert compilations() == 2
    assert fast.engine == "compile"


def test_batch_norms_that_run_their_own_code_compile(traced_only: None) -> None:
    parts = nn.Conv2d(3, 8, 3), BatchNormAct(8), nn.Conv2d(8, 8, 3), nn.ReLU(), BatchNormAct(8), nn.Flatten()
    net = settle(nn.Sequential(*parts, nn.Linear(128, 5))).eval()
    fast, x, y = FastAttackModel(net, engine="compile", **FLOAT32), torch.rand(4, 3, 8, 8), torch.arange(4)
    for _ in range(2):
        found = input_gradient(fast, x, y)
        assert (cosine(found, input_gradient(net, x, y)) > 0.9999).all()
        change(net)
    assert fast.engine == "compile"
    assert [done.split()[0] for done in fast._networks.folded.report.values()] == ["folded", "frozen"]


def test_what_does_not_compile_runs_eager_and_says_so_once(traced_only: None) -> None:
    net, (x, y) = Branching(), batch()
    fast = FastAttackModel(net, engine="compile", **FLOAT32)
    expected = input_gradient(eager(net), x, y)
    with pytest.warns(FastAttackWarning, match="engine is eager, since torch.compile raised"):
        found = input_gradient(fast, x, y)
    assert torch.equal(found, expected)
    assert torch.equal(input_gradient(fast, x, y), expected)  # and no warning
    assert fast.engine == "eager"


# --- how often --------------------------------------------------------------------------------------------------------


def test_only_so_many_kinds_are_compiled(
    traced_only: None, compilations: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "MOST", 2)
    net = small_net()
    fast, plain = FastAttackModel(net, engine="compile", **FLOAT32), eager(net)
    for samples in (2, 3, 4, 2):
        x, y = batch(samples)
        assert (cosine(input_gradient(fast, x, y), input_gradient(plain, x, y)) > 0.9999).all()
    assert compilations() == 2
    assert fast.engine == "compile"


def test_more_kinds_than_torch_compile_keeps_by_itself(traced_only: None, compilations: Callable[[], int]) -> None:
    fast = FastAttackModel(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), engine="compile", **FLOAT32)
    for samples in [*range(1, 13), *range(1, 13)]:
        input_gradient(fast, *batch(samples))
    assert compilations() == 12
    assert fast.engine == "compile"


def test_other_strides_are_no_other_compilation(traced_only: None, compilations: Callable[[], int]) -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, engine="compile", channels_last=False, **FLOAT32)
    for image in (x, x.contiguous(memory_format=torch.channels_last), x.flip(0).flip(0), x[:, :, :, ::1]):
        input_gradient(fast, image, y)
    assert compilations() == 1


def test_one_compilation_per_shape_whatever_the_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "compile")
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    fast = FastAttackModel(net, **FLOAT32)
    plain = torch.rand(2, 1, 8, 8)
    torch._dynamo.utils.counters.clear()
    for x in (plain, plain.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), torch.rand(4, 1, 8, 8)[::2]):
        leaf = x.detach().requires_grad_()
        fast(leaf).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- other code in the process ----------------------------------------------------------------------------------------


def test_more_models_than_the_compiler_allows_for_one_code(monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "compile")
    torch._dynamo.reset()
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)) for outputs in range(2, 8)]
    fasts = [FastAttackModel(net, **FLOAT32) for net in nets]
    limits = ("accumulated_recompile_limit", "accumulated_cache_size_limit")  # the latter up to PyTorch 2.6
    limit = next(name for name in limits if hasattr(torch._dynamo.config, name))
    with torch._dynamo.config.patch({limit: 2}):
        for fast in fasts:
            fast(torch.rand(2, 1, 8, 8).requires_grad_()).sum().backward()
    assert [fast.engine for fast in fasts] == ["compile"] * len(fasts)


def test_what_the_compiler_gave_up_elsewhere_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "compile")
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    fast = FastAttackModel(net, **FLOAT32)
    codes = [nn.Sequential.forward.__code__, torch._dynamo.external_utils.wrap_inline(len).__code__]
    torch._dynamo.utils.counters.clear()
    for code in codes:
        torch._dynamo.eval_frame.skip_code(code)
    try:
        fast(torch.rand(2, 1, 8, 8).requires_grad_()).sum().backward()
    finally:
        for code in codes:
            torch._C._dynamo.eval_frame.reset_code(code)
    assert fast.engine == "compile", fast.summary()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
