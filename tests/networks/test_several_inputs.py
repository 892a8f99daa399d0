"""Audits of calls in which several inputs want a gradient: each is judged by itself."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.boundary import DeviceState
from fastadv_adapters.networks import audit, audited, auditing
from fastadv_adapters.networks.schedule import PASSES
from tests.support.tools import cosine

OTHERS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.rand(16, 12) / 200,
    "number": lambda: torch.rand(16) / 200,
    "prompt": lambda: torch.rand(4, 12) / 200,
    "temperature": lambda: torch.tensor(1.0),
}


class Rippled(nn.Module):
    """Its outputs are nearly right in bfloat16; the gradient at the images is not, for a small ripple that is steep."""

    ripple: Tensor

    def __init__(self, ripple: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.other = nn.Linear(48, 32), nn.Linear(32, 10), nn.Linear(12, 10)
        self.register_buffer("ripple", torch.tensor(ripple))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        hidden = 3 * self.first(x.flatten(1) * 2 - 1)
        logits: Tensor = self.last(hidden + self.ripple * torch.sin(400 * hidden))
        if other.ndim == 0:
            return logits / other
        moved = self.other(other * 200) if other.ndim == 2 else other[:, None] * torch.linspace(-100, 100, 10)
        return logits + (moved if len(moved) == len(x) else moved.mean(0))


class OtherFirst(nn.Module):
    """With the images last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, other: Tensor, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x, other)
        return logits


def images() -> Tensor:
    return torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, *inputs: Tensor, sizes: Tensor | float = 1.0) -> Sequence[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    losses = F.cross_entropy(model(*leaves), torch.arange(16) % 10, reduction="none")
    return torch.autograd.grad((losses * sizes).sum(), leaves)


@pytest.mark.filterwarnings("ignore:.*one loss scale serves the whole call")
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_the_gradient_at_one_input_hides_no_other(kind: str, first: bool) -> None:
    model, inputs = Rippled(0.02), (images(), OTHERS[kind]())
    net = (OtherFirst(model) if first else model).eval()
    inputs = inputs[::-1] if first else inputs
    fast = FastAttackModel(net, dtype=torch.bfloat16)
    with pytest.warns(FastAttackWarning, match=r"the median cosine .* it runs in torch\.float32 from now on"):
        gradients(fast, *inputs)
    for found, exact in zip(gradients(fast, *inputs), gradients(net, *inputs), strict=True):
        assert (cosine(found.reshape(1, -1), exact.reshape(1, -1)) > 0.9999).all()


@pytest.mark.filterwarnings("ignore:.*one loss scale serves the whole call")
@pytest.mark.parametrize("kind", OTHERS)
def test_inputs_whose_gradients_are_good_stay_in_half_precision(kind: str) -> None:
    net = Rippled(0.0).eval()
    fast, sizes = FastAttackModel(net, dtype=torch.bfloat16), 10.0 ** -torch.arange(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAttackWarning)
        gradients(fast, images(), OTHERS[kind](), sizes=sizes)
    assert [k.dtype for k in fast._networks.kinds.values()] == [torch.bfloat16]
    assert [k.schedule.looked for k in fast._networks.kinds.values()] == [6]
    assert "could not be audited" not in fast.summary()


@pytest.mark.filterwarnings("ignore:.*one loss scale serves the whole call")
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ["prompt", "temperature"])
def test_samples_that_lose_their_gradient_beside_an_input_that_all_share_are_seen(kind: str, first: bool) -> None:
    """One scale serves all samples then, and in float16 those with small gradients get none."""
    model, inputs, sizes = Rippled(0.0), (images(), OTHERS[kind]()), 10.0 ** -torch.arange(16)
    net = (OtherFirst(model) if first else model).eval()
    inputs = inputs[::-1] if first else inputs
    fast = FastAttackModel(net, dtype=torch.float16)
    with pytest.warns(FastAttackWarning, match=r"of 16 samples have no gradient"):
        gradients(fast, *inputs, sizes=sizes)
    for found, exact in zip(gradients(fast, *inputs, sizes=sizes), gradients(net, *inputs, sizes=sizes), strict=True):
        rows = (16, -1) if len(exact.shape) > 3 else (1, -1)
        assert (cosine(found.reshape(rows), exact.reshape(rows)) > 0.99).all()


@pytest.mark.usefixtures("as_on_a_device")
def test_a_glance_that_waits_for_nothing_sees_each_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audited, "_is_never_to_wait", lambda device: True)
    monkeypatch.setattr(audit, "state_on", DeviceState)
    net, inputs = Rippled(0.0).eval(), (images(), OTHERS["rows"]())
    fast = FastAttackModel(net, dtype=torch.bfloat16)
    gradients(fast, *inputs)
    net.ripple.fill_(0.02)
    (kind,) = fast._networks.kinds.values()
    kind.schedule.passes = PASSES
    gradients(fast, *inputs)
    assert kind.glimpse is not None
    assert kind.glimpse.is_doubtful()


def test_an_audit_that_could_judge_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(problem: Any, found: Any) -> Any:
        raise RuntimeError("expected one call")

    monkeypatch.setattr(auditing, "look", refuse)
    fast = FastAttackModel(Rippled(0.0).eval(), dtype=torch.bfloat16)
    gradients(fast, images(), OTHERS["rows"]())
    assert "gradients could not be audited" in fast.summary()
