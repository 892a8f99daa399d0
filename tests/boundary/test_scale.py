"""The scale against overflow: lowered where a gradient overflows, climbing back, and nobody else's affair."""

from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.boundary import DeviceState, HostState
from fastadv_adapters.boundary.scaling import FLOOR, PATIENCE, START
from fastadv_adapters.networks import half
from fastadv_adapters.torchattacks import accelerate
from tests.support.tools import attackable_net, batch, cosine, head_of, input_gradient, reference, small_net, steep


@pytest.fixture(autouse=True, params=[HostState, DeviceState])
def state(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What holds for one way to keep exponents and counts holds for the other."""
    monkeypatch.setattr("fastadv_adapters.networks.pair.state_on", request.param)
    return request.param


def weighted(weights: list[float]) -> Any:
    return lambda logits, y: (logits * torch.linspace(-1, 1, 10) * torch.tensor(weights)[:, None]).sum()


def ramp(logits: Tensor, y: Tensor) -> Tensor:
    return (logits * torch.linspace(-1, 1, 10)).sum()


# --- the first pass ---------------------------------------------------------------------------------------------------


def test_the_first_pass_of_a_steep_network_is_not_lost_nor_the_first_after_an_update() -> None:
    net, (x, _) = steep(), batch(6)
    fast, truth = FastAttackModel(net, dtype=torch.float16), input_gradient(reference(net), x.double(), x, ramp)
    for _ in range(3):
        assert (cosine(input_gradient(fast, x, x, ramp), truth) > 0.98).all()
        fast.update()
    assert fast.gradient_stats.nonfinite == 0
    assert FLOOR <= int(fast._networks.state.exponent) < START


def test_a_single_step_in_float16_is_as_strong_on_a_network_with_large_logits() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = attackable_net()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x) * 4.0 * 4.0
            return out

    net, (x, _) = Steep().eval(), batch(40)
    with torch.no_grad():
        y = net(x).argmax(1)
    robust = []
    for dtype in (torch.float32, torch.float16):
        attack = accelerate(torchattacks.FGSM(net, eps=0.1), dtype=dtype)
        robust.append(int((net(attack(x, y)).argmax(1) == y).sum()))
    assert robust[0] < 20, "the test needs an attack that works"
    assert abs(robust[1] - robust[0]) <= 1


def test_where_no_scale_helps_it_stays_where_it_was_and_float32_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "lost", lambda gradient, full: True)
    fast, (x, y) = FastAttackModel(small_net(), dtype=torch.float16), batch()
    with pytest.warns(FastAttackWarning, match=r"since .* infinite or NaN at every scale.*#not-half"):
        input_gradient(fast, x, y)
    assert int(fast._networks.state.exponent) == START
    assert fast.dtype == torch.float32


# --- later passes -----------------------------------------------------------------------------------------------------


def test_the_scale_climbs_back_after_long_calm_and_no_higher_than_it_began(state: Any) -> None:
    number = int if state is HostState else torch.tensor
    state = state(torch.device("cpu"))
    state.start_at_most(2)
    state.lower_after(number(1))
    assert int(state.exponent) == 0
    found = []
    for _ in range(3):
        for _ in range(PATIENCE):
            state.lower_after(number(0))
        state.follow()
        state.follow()
        found.append(int(state.exponent))
    assert found == [2, 2, 2]


def test_weights_that_are_far_steeper_overflow_after_the_update_and_are_right_a_few_passes_later() -> None:
    net, (x, _) = small_net(), batch(3)
    fast = FastAttackModel(net, dtype=torch.float16)
    input_gradient(fast, x, x, ramp)
    net.load_state_dict(steep().state_dict())
    lost = []
    for _ in range(8):
        fast.reset_gradient_stats()
        found = input_gradient(fast, x, x, ramp)
        lost.append(fast.gradient_stats.nonfinite)
    assert lost[0] > 0, "the test needs weights that overflow at the scale of those before"
    assert lost[-1] == 0
    truth = input_gradient(reference(net), x.double(), x, ramp)
    for gradient in (found, input_gradient(FastAttackModel(net, dtype=torch.float16), x, x, ramp)):
        assert (cosine(gradient, truth) > 0.98).all()


def test_a_sample_that_comes_in_as_nan_does_not_vote_on_the_scale() -> None:
    fast, (x, _) = FastAttackModel(steep(), dtype=torch.float16), batch(3)
    for _ in range(16):
        found = input_gradient(fast, x, x, weighted([float("nan"), 1.0, 1.0]))
    assert found[0].count_nonzero() == 0
    assert all(row.count_nonzero() > 0 for row in found[1:])
    assert int(fast._networks.state.exponent) < START


class BrokenAndSteep(nn.Module):
    """The first sample's gradient is NaN whatever the scale; the others overflow at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.net = steep()

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x * 1.0
            x.register_hook(lambda grad: torch.cat([grad[:1] * float("nan"), grad[1:]]))
        out: Tensor = self.net(x)
        return out


def test_a_broken_sample_does_not_keep_overflow_from_being_cured() -> None:
    fast, (x, _) = FastAttackModel(BrokenAndSteep(), dtype=torch.float16), batch(3)
    for _ in range(16):
        found = input_gradient(fast, x, x, weighted([1.0, 1.0, 1.0]))
    assert found[0].count_nonzero() == 0
    assert all(row.count_nonzero() > 0 for row in found[1:])


# --- entries ----------------------------------------------------------------------------------------------------------


class Maps(nn.Module):
    """Scores for each pixel, from that pixel alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def test_entries_that_are_lost_beside_others_of_their_sample_are_told() -> None:
    net, x = Maps().eval(), torch.rand(2, 3, 8, 8)
    faint = torch.ones(8, 8)
    faint[0, :3] = 1e-12  # pixels that are sure of themselves; with a few more the audit would take another dtype

    def loss(scores: Tensor, _: Tensor) -> Tensor:
        return (scores.sum(1) * faint).sum()

    shares, zero = [], []
    for dtype in (torch.float32, torch.float16):
        fast = FastAttackModel(net, dtype=dtype, engine="eager")
        assert fast.zero_entries == 0.0
        found = input_gradient(fast, x, x, loss)
        assert fast.zero_entries == pytest.approx(float((found == 0).float().mean()))
        shares.append(fast.zero_entries)
        zero.append(fast.gradient_stats.zero)
    assert zero == [0, 0], "no sample looks lost"
    assert shares[0] == 0.0
    assert shares[1] == pytest.approx(3 / 64)
    fast.reset_gradient_stats()
    assert fast.zero_entries == 0.0


# --- where no scale is needed -----------------------------------------------------------------------------------------


def test_on_a_processor_nothing_is_scaled_in_the_middle_of_a_wide_range() -> None:
    state, leaves = HostState(torch.device("cpu")), [torch.rand(3, 4)]
    grads = [torch.tensor([[1.0, -(2.0**20)], [2.0**-33, 0.0], [0.0, 0.0]])]
    for wide, same in ((True, False), (True, True), (False, False), (True, True)):  # the first pass is scaled
        shift = state.shift_for("per-sample", grads, leaves, wide=wide)
        assert shift is not None
        assert torch.equal(shift.times(grads[0]), grads[0]) is same
        found, broken = state.finish("per-sample", [shift.times(grads[0])], shift)
        assert broken is not None
        assert torch.equal(found[0], grads[0])
    for outside in (2.0**33, 2.0**-34):
        shift = state.shift_for("per-sample", [torch.tensor([[1.0], [outside]])], [torch.rand(2, 4)], wide=True)
        assert shift is not None
        assert (shift.times(torch.tensor([[1.0], [outside]])) >= 2.0**START).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_that_shrink_on_the_way_back_come_back_at_the_floor_sample_by_sample(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 4)).eval()
    x, weights = torch.rand(2, 1, 8, 8), torch.tensor([[1.0], [2.0**-20]])
    with torch.no_grad():
        net[1].weight.mul_(2.0**-60)  # type: ignore[operator]
        net[2].weight.mul_(2.0**-50)  # type: ignore[operator]
    x = x.requires_grad_()
    truth = torch.autograd.grad(reference(net)(x.double())[:, 0].sum(), x)[0]
    fast = FastAttackModel(net, dtype=dtype)
    for _ in range(3):
        (found,) = torch.autograd.grad((fast(x)[:, 0] * weights[:, 0]).sum(), x)
        peaks = found.flatten(1).abs().amax(1)
        assert (peaks >= 2.0**-100).all()
        assert (peaks < 2.0**-98).all()
        assert (cosine(found, truth) > 0.98).all()


class Cast(nn.Module):
    """A convolution that runs in float16 whatever the network runs in: by casts, or in an autocast region."""

    def __init__(self, *, autocast: bool) -> None:
        super().__init__()
        self.autocast, self.first, self.second = autocast, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.autocast:
            with torch.autocast("cpu", dtype=torch.float16):
                x = self.second(x)
        else:
            weight, bias = self.second.weight, self.second.bias
            x = nn.functional.conv2d(x.half(), weight.half(), None if bias is None else bias.half())
        logits: Tensor = self.last(x.to(self.last.weight.dtype).mean((2, 3)))
        return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [lambda: Cast(autocast=False), lambda: Cast(autocast=True), small_net])
def test_no_pass_loses_what_float16_of_the_models_own_does_not_hold(make: Any, dtype: torch.dtype) -> None:
    net, (x, y) = make().eval(), batch()
    x = x.half() if isinstance(net, nn.Sequential) else x  # an input is enough
    weights = [1e-7, 1e-6, 1e-5, 1e-4, 1e-8, 1e-9]
    truth = input_gradient(net, x.float(), y, ramp)
    fast = FastAttackModel(net, dtype=dtype)
    for _ in range(3):
        found = input_gradient(fast, x, y, weighted(weights))
        assert (cosine(found, truth) > 0.95).all()
    assert fast.gradient_stats.zero == 0


def test_no_pass_overflows_at_an_input_in_float16_that_the_plain_gradient_does_not() -> None:
    net, (x, y) = steep().eval(), batch()
    with torch.no_grad():
        head_of(net).weight.mul_(100)
    fast, truth = FastAttackModel(net, dtype=torch.float32), input_gradient(net, x, y, ramp)
    for _ in range(3):
        assert (cosine(input_gradient(fast, x.half(), y, ramp), truth) > 0.95).all()
    assert fast.gradient_stats.nonfinite == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_the_first_pass_through_float16_of_the_models_own_is_not_lost(autocast: bool, dtype: torch.dtype) -> None:
    net, (x, y) = Cast(autocast=autocast).eval(), batch()
    with torch.no_grad():
        net.last.weight.mul_(3e5 / net.last.weight.abs().max())
    truth, fast = input_gradient(net, x, y, ramp), FastAttackModel(net, dtype=dtype)
    assert truth.isfinite().all()
    assert (cosine(input_gradient(fast, x, y, ramp), truth) > 0.95).all()
    assert fast.gradient_stats.nonfinite == 0
