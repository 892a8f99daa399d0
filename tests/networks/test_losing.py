"""What half precision loses to infinity or NaN, pass after pass, and a few samples that it serves badly."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.boundary import DeviceState, HostState
from fastadv_adapters.networks import audit, schedule
from fastadv_adapters.networks.finding import SAMPLES, Finding
from fastadv_adapters.networks.schedule import CURED, PATIENCE, SOON, Schedule
from tests.support.tools import attackable_net, batch, cosine, input_gradient

HALVES = [torch.bfloat16, torch.float16]


class Angles(nn.Module):
    """Sines of angles between features: `1 - 1e-4` is 1 in half precision, where the gradient of `sqrt` is infinite."""

    def __init__(self, *, when_bright: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.when_bright = nn.Conv2d(3, 8, 3, 1, 1), nn.Linear(64, 10), when_bright

    def forward(self, x: Tensor) -> Tensor:
        features = F.normalize(self.first(x), dim=1).flatten(2)
        cosines = features.transpose(1, 2) @ features
        limit = torch.where(x.mean((1, 2, 3)) >= self.when_bright, 1 - 1e-4, 0.9).view(-1, 1, 1).to(cosines.dtype)
        cosines = torch.minimum(torch.maximum(cosines, -limit), limit)
        logits: Tensor = self.last((1 - cosines * cosines).sqrt().mean(2))
        return logits


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_that_no_scale_saves_are_seen_before_the_first_pass(dtype: torch.dtype) -> None:
    model, (x, y) = Angles().eval(), batch(12)
    fast = FastAttackModel(model, dtype=dtype)
    with pytest.warns(FastAttackWarning, match="infinite or NaN at every scale.*#not-half"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(model, x, y)) > 0.9999).all()
    assert fast.gradient_stats.nonfinite == 0


def bright_from(sample: int) -> tuple[Tensor, Tensor]:
    """Images that are dark, but from this one on."""
    x, y = batch(16)
    return x * (0.2 + 0.8 * (torch.arange(16) >= sample)).view(-1, 1, 1, 1), y


@pytest.fixture
def same_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brighter images are not what brings an audit forward."""
    monkeypatch.setattr(schedule, "are_others", lambda now, before: False)


def test_a_pass_that_loses_samples_in_bfloat16_is_judged_by_them() -> None:
    """The self-check sees the first four samples alone; no scale cures a bfloat16."""
    model, (x, y) = Angles(when_bright=0.3).eval(), bright_from(4)
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    with pytest.warns(FastAttackWarning, match="samples have no gradient.*#audit-failed"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(model, x, y)) > 0.99).all()


@pytest.mark.usefixtures("same_inputs")
@pytest.mark.parametrize(("dtype", "passes"), [(torch.bfloat16, PATIENCE), (torch.float16, PATIENCE + CURED)], ids=str)
def test_passes_that_lose_samples_in_a_row_bring_the_audit_forward(dtype: torch.dtype, passes: int) -> None:
    model = Angles(when_bright=0.3).eval()
    fast = FastAttackModel(model, dtype=dtype, engine="eager")
    fast._networks.state = HostState(torch.device("cpu"))  # on CUDA nothing tells of lost samples without waiting
    input_gradient(fast, *bright_from(16))
    x, y = bright_from(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(passes - 1):
            input_gradient(fast, x, y)
    with pytest.warns(FastAttackWarning, match="audit-failed"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(model, x, y)) > 0.99).all()
    assert (cosine(input_gradient(fast, x, y), input_gradient(model, x, y)) > 0.9999).all()


def test_if_nothing_tells_of_later_passes_samples_lost_in_the_first_bring_the_next_audit_forward() -> None:
    for sample, passes in ((4, SOON - CURED), (16, 0)):
        fast = FastAttackModel(Angles(when_bright=0.3).eval(), dtype=torch.float16, engine="eager")
        fast._networks.state = DeviceState(torch.device("cpu"))
        input_gradient(fast, *bright_from(sample))
        (kind,) = fast._networks.kinds.values()
        assert kind.schedule.passes == passes


def test_passes_that_lose_nothing_in_between_start_the_count_anew() -> None:
    kind = Schedule()
    assert [kind.is_losing(lost, curable=False) for lost in (1, 0, 1, 0, 1, 1)] == [False] * 5 + [True]
    assert [kind.is_losing(1, curable=False) for _ in range(4)] == [False] * 3 + [True], "twice as patient"
    assert not kind.is_losing(None, curable=False)


class Experts(nn.Module):
    """Two experts; to one of them a third of the images are sent, and it works around a large number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.sure, self.other, self.number = attackable_net(), attackable_net(), number

    def forward(self, x: Tensor) -> Tensor:
        other = self.other[0](x) + self.number
        other = self.other[1:]((other - self.number) * 1.0)
        return torch.where((x[:, 0, 0, :1] > 2 / 3), other.float(), self.sure(x).float())


@pytest.mark.parametrize("number", [500.0, 2000.0])
def test_a_third_of_the_samples_with_bad_gradients_is_no_minority_to_be_overlooked(number: float) -> None:
    model, (x, y) = Experts(number).eval(), batch(64)
    sent = x[:, 0, 0, 0] > 2 / 3
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    with pytest.warns(FastAttackWarning, match=r"worst|median.*#audit-failed"):
        input_gradient(fast, x, y)
    assert 12 < int(sent.sum()) < 30
    assert (cosine(input_gradient(fast, x, y), input_gradient(model, x, y)) > 0.9999).all()


def test_one_sample_alone_that_points_elsewhere_has_as_many_others_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    look = audit.look

    def lone(problem: Any, found: Any) -> Finding:
        seen.append(problem.index)
        look(problem, found)
        return Finding(SAMPLES, 0, 1.0, lone=len(seen) == 1)

    monkeypatch.setattr("fastadv_adapters.networks.auditing.look", lone)
    input_gradient(FastAttackModel(attackable_net(), dtype=torch.bfloat16), *batch(32))
    assert len(seen) == 2
    assert len(set(seen[0].tolist()) | set(seen[1].tolist())) == 2 * SAMPLES


def test_samples_with_the_smallest_gradients_are_looked_at_and_others_up_to_the_largest() -> None:
    peaks = torch.arange(1.0, 35.0).flip(0)[:, None]
    assert audit.choose([peaks], [torch.ones(34, 10)]).tolist() == [0, 11, 21, 31, 32, 33]
    lost = torch.arange(34) == 12
    assert 12 in audit.choose([peaks], [torch.ones(34, 10)], None, lost).tolist()
    for samples, looked in ((9, 6), (63, 12), (200, 32)):
        some = audit.choose([torch.rand(samples, 1)], [torch.ones(samples, 10)]).tolist()
        assert len(some) == len(set(some)) == looked


def test_the_lowest_but_for_one_in_sixteen_is_of_those_that_are_numbers() -> None:
    assert audit.lowest(torch.tensor([3.0, torch.nan, 1.0, 2.0])) == 2.0
    assert audit.lowest(torch.tensor([torch.nan, 1.0])) == 1.0
    assert audit.lowest(torch.arange(32.0)) == 2.0
    assert audit.lowest(torch.empty(0)) != audit.lowest(torch.empty(0)), "NaN"
