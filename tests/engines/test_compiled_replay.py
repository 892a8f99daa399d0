"""What is recorded is the compiled network: at once, after some passes, or eager operators if it cannot be compiled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastadv_adapters import FastAttackModel
from fastadv_adapters.modules import FastAttackWarning
from tests.engines.test_replay import Branching, Counting, Drawing, change, eager, recorder_of
from tests.support.engines import use_engine
from tests.support.tools import batch, cosine, input_gradient, small_net

pytestmark = pytest.mark.long

FLOAT32: Any = {"dtype": torch.float32}
ONCE = 1 if hasattr(torch._dynamo.config, "recompile_limit") else 2
"""PyTorch 2.6 compiles once more inside the mode that stands for a capture here."""


@pytest.fixture
def compilations() -> Callable[[], int]:
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def close(fast: FastAttackModel, plain: FastAttackModel, x: Tensor, y: Tensor) -> None:
    assert (cosine(input_gradient(fast, x, y), input_gradient(plain, x, y)) > 0.9999).all()
    torch.testing.assert_close(fast.view(decisions="fast")(x), plain.view(decisions="fast")(x), rtol=1e-4, atol=1e-4)


def test_it_is_compiled_once_recorded_and_replayed(
    monkeypatch: pytest.MonkeyPatch, compilations: Callable[[], int]
) -> None:
    use_engine(monkeypatch, "both")
    net, (x, y) = small_net(), batch()
    fast, plain = FastAttackModel(net, **FLOAT32), eager(net)
    for _ in range(3):
        close(fast, plain, x, y)
        change(net)  # and nothing is compiled or recorded again
    assert fast.engine == "compile"
    assert recorder_of(fast).captured == 2
    assert compilations() <= ONCE
    assert "engine is" not in fast.summary()


def test_it_is_compiled_after_so_many_passes_of_a_kind(
    monkeypatch: pytest.MonkeyPatch, compilations: Callable[[], int]
) -> None:
    use_engine(monkeypatch, "both", compile_after=3)
    net, (x, y) = small_net(), batch()
    fast, plain = FastAttackModel(net, **FLOAT32), eager(net)
    seen = []
    for _ in range(5):
        found, wanted = input_gradient(fast, x, y), input_gradient(plain, x, y)
        assert (cosine(found, wanted) > 0.9999).all()
        seen.append((fast.engine, min(compilations(), 1), recorder_of(fast).captured))
    assert seen == [("cudagraph", 0, 2)] * 3 + [("compile", 1, 4)] * 2
    assert compilations() <= ONCE


@pytest.mark.parametrize(
    ("make", "engine"),
    [(Counting, "eager"), (Drawing, "eager"), (Branching, "eager")],
    ids=["counts", "draws", "branches"],
)
def test_what_no_recording_repeats_runs_eager(
    make: Callable[[], nn.Module], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, "both")
    net, (x, y) = make(), batch()
    fast = FastAttackModel(net, **FLOAT32, channels_last=False)
    plain = eager(net, channels_last=False)
    for _ in range(3):
        torch.manual_seed(1)
        found = input_gradient(fast, x, y)
        torch.manual_seed(1)
        assert torch.equal(found, input_gradient(plain, x, y))
    assert fast.engine == "eager"


class Prints(nn.Module):
    """What the compiler refuses, and a recording repeats: a call of code that it is told to leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        out: Tensor = self.net(x)
        return out


def test_what_cannot_be_compiled_is_recorded_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "both")
    net, (x, y) = Prints(), batch()
    fast, plain = FastAttackModel(net, **FLOAT32), eager(net)
    for _ in range(3):
        assert torch.equal(input_gradient(fast, x, y), input_gradient(plain, x, y))
    assert fast.engine == "cudagraph"
    assert "the engine is cudagraph, since torch.compile raised" in fast.summary()


def test_a_capture_of_compiled_code_that_breaks_is_made_of_eager_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "both")
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    recorder = recorder_of(fast)
    capture, calls = recorder.capture, []

    def breaks_first(work: Callable[[], object]) -> Callable[[], object]:
        calls.append(work)
        if len(calls) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture(work)

    monkeypatch.setattr(recorder, "capture", breaks_first)
    assert torch.equal(input_gradient(fast, x, y), input_gradient(eager(net), x, y))
    assert (fast.engine, len(calls)) == ("cudagraph", 3)
    assert "not permitted when stream is capturing" in fast.summary()


def test_the_warning_names_what_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "both")
    fast = FastAttackModel(Prints(), **FLOAT32)
    fast._networks._engine = "compile"  # as if it had been asked for, on a device that records
    with pytest.warns(FastAttackWarning, match="the engine is cudagraph, since torch.compile raised"):
        input_gradient(fast, *batch())
