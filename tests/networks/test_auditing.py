"""The audit: what it catches, what it leaves alone, how often it is made, and what it costs."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.boundary import DeviceState, Packed, ends_of
from fastadv_adapters.engines.waiting import refuse_what_waits
from fastadv_adapters.networks import audit, audited, auditing, glimpse
from fastadv_adapters.networks.finding import SAMPLES, Finding
from fastadv_adapters.networks.nearness import off_by
from fastadv_adapters.networks.schedule import PASSES, SOON
from tests.networks.test_rounding import Constant
from tests.support.tools import attackable_net, batch, between_the_ends, cosine, head_of, input_gradient, small_net

HALVES = [torch.bfloat16, torch.float16]


class Cancels(nn.Module):
    """Adds a large number and takes it away again, in code of its own, which no fold can mend."""

    def __init__(self, number: float = 3e3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.number = nn.Linear(48, 32), nn.Linear(32, 10), number

    def forward(self, x: Tensor, *, safe: bool = False) -> Tensor:
        hidden = self.first(x.flatten(1))
        hidden = hidden if safe else (hidden + self.number) - self.number
        logits: Tensor = self.last(F.gelu(hidden * 3))
        return logits


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each look of an audit has seen."""
    seen: list[int] = []
    look = audit.look

    def counted(problem: Any, found: Any) -> Any:
        seen.append(len(found[0]))
        return look(problem, found)

    monkeypatch.setattr(auditing, "look", counted)
    return seen


def images(samples: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(samples, 3, 4, 4, generator=generator), torch.arange(samples) % 10


class CancelsLater(Cancels):
    """Only for images that are dark in one corner; the self-check sees the first four alone."""

    def forward(self, x: Tensor, *, safe: bool = False) -> Tensor:
        hidden = self.first(x.flatten(1))
        dark = (x[:, 0, 0, :1] < 0.5).to(hidden.dtype)
        hidden = (hidden + self.number * dark) - self.number * dark
        logits: Tensor = self.last(F.gelu(hidden * 3))
        return logits


def images_for_later(samples: int) -> tuple[Tensor, Tensor]:
    x, y = images(samples)
    x[:, 0, 0, 0] = (torch.arange(samples) < 4).float()
    return x, y


@pytest.mark.parametrize("samples", [3, 16])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_outputs_that_are_far_off_are_seen_before_any_is_handed_out(dtype: torch.dtype, samples: int) -> None:
    model, (x, y) = Cancels().eval(), images(samples)
    fast, truth = FastAttackModel(model, dtype=dtype), input_gradient(model, x, y)
    with pytest.warns(FastAttackWarning, match=r"run in float32, since in .* its outputs are off by .*#not-half"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, truth) > 0.9999).all()


def test_outputs_are_as_far_off_as_those_of_half_the_samples() -> None:
    exact = torch.eye(4)
    assert [off_by(exact * torch.tensor([[a], [b], [1.0], [1.0]]), exact) for a, b in ((0.6, 0.6), (0.6, 1.0))] == [
        pytest.approx(0.4),
        0.0,
    ]


class LeavesOut(Cancels):
    """Leaves a class out, by -inf or by a number far below."""

    least = -torch.inf

    def forward(self, x: Tensor, *, safe: bool = False) -> Tensor:
        return super().forward(x, safe=safe).masked_fill(torch.arange(10) == 3, self.least)


@pytest.mark.parametrize("least", [-torch.inf, -1e9, -1e4])
def test_a_class_that_is_left_out_hides_no_outputs_that_are_far_off(least: float) -> None:
    model, (x, _) = LeavesOut().eval(), images()
    model.least = least
    with pytest.warns(FastAttackWarning, match=r"its outputs are off by .*#not-half"):
        FastAttackModel(model, dtype=torch.bfloat16)(x.requires_grad_())


def test_outputs_that_are_off_by_a_third_are_too_far() -> None:
    """Attacks on such networks were two in a hundred weaker; see `benchmarks.precision.truth`."""
    model, (x, y) = Cancels(60.0).eval(), images()
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    with pytest.warns(FastAttackWarning, match=r"its outputs are off by [123]\d% .*#not-half"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(model, x, y)) > 0.9999).all()


class Opposite(nn.Module):
    """Two logits of opposite sign, which are both near zero at the boundary between the classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        logit: Tensor = self.layers(x)
        return torch.cat([logit, -logit], 1)


def test_outputs_near_zero_where_an_attack_led_the_samples_fail_no_audit(looks: list[int]) -> None:
    model, (x, _) = Opposite().eval(), images()
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    at_boundary = x.clone()
    for _ in range(20):
        leaf = at_boundary.requires_grad_()
        logit = model(leaf)[:, 0]
        (slope,) = torch.autograd.grad(logit.sum(), leaf)
        step = (logit / slope.flatten(1).square().sum(1)).view(-1, 1, 1, 1)
        at_boundary = (leaf - step * slope).detach()
    assert model(at_boundary).abs().max() < 1e-4
    first = torch.zeros(len(x), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        input_gradient(fast, x, first)
        for _ in range(PASSES):
            input_gradient(fast, at_boundary, first)
    assert len(looks) == 2


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_outputs_that_are_far_off_fail_an_audit_whatever_their_gradients(dtype: torch.dtype) -> None:
    model, (x, y) = CancelsLater(3e3).eval(), images_for_later(16)
    fast = FastAttackModel(model, dtype=dtype)

    def first(logits: Tensor, _: Tensor) -> Tensor:
        return logits[:, 0].sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "look", lambda problem, found: Finding(8, 0, float(bool(exact_of(problem)))))
        with pytest.warns(FastAttackWarning, match=r"are off by .*%"):
            input_gradient(fast, x, y, first)
    assert (cosine(input_gradient(fast, x, y), input_gradient(model, x, y)) > 0.9999).all()


def exact_of(problem: audit.Problem) -> list[Tensor]:
    return problem.exact(problem.tensors)


@pytest.mark.parametrize("samples", [12, 16])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_half_precision_cannot_do_runs_in_float32_from_the_first_pass_on(dtype: torch.dtype, samples: int) -> None:
    model, (x, y) = CancelsLater().eval(), images_for_later(samples)
    fast, truth = FastAttackModel(model, dtype=dtype), input_gradient(model, x, y)
    with pytest.warns(
        FastAttackWarning, match=r"not good enough.*in torch\.float32 from now on.*#audit-failed"
    ) as caught:
        first = input_gradient(fast, x, y)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = input_gradient(fast, x, y)
    assert (cosine(first, truth) > 0.95).all()  # the loss has seen the logits in half precision
    assert (cosine(second, truth) > 0.9999).all()
    assert "not good enough" in fast.summary()
    assert fast.dtype == torch.float32
    assert ", but float32 in 1 of 1 kinds of calls\n" in fast.summary()
    with torch.no_grad():  # and it goes on following
        model.first.weight.mul_(-1)
    assert (cosine(input_gradient(fast, x, y), input_gradient(model, x, y)) > 0.9999).all()


def test_each_dtype_that_was_too_little_is_named_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # bfloat16 is found wanting, float16 good enough; later that is wanting, and float32 good enough
    looks = iter([False, True, False, True])

    def look(problem: audit.Problem, found: Any) -> Finding:
        problem.exact(problem.tensors)
        return Finding(8, 0, 1.0 if next(looks) else 0.1)

    monkeypatch.setattr(auditing, "look", look)
    monkeypatch.setattr(audited, "is_in_hardware", lambda dtype, device: True)
    fast, (x, y) = FastAttackModel(small_net().eval(), dtype=torch.bfloat16), batch(12)
    with pytest.warns(FastAttackWarning, match=r"gradients in torch\.bfloat16 .* in torch\.float16 from now on"):
        input_gradient(fast, x, y)
    (kind,) = fast._networks.kinds.values()
    kind.schedule.passes = PASSES
    with pytest.warns(FastAttackWarning, match=r"gradients in torch\.float16 .* in torch\.float32 from now on"):
        input_gradient(fast, x, y)
    assert kind.dtype == torch.float32


class Either(Cancels):
    """A sample in eleven overflows in float16; outputs have too few digits in bfloat16."""

    def forward(self, x: Tensor, *, safe: bool = False) -> Tensor:
        lit = (x[:, 0, 0, :1] > 0.99) * 2e5
        return super().forward(x) + lit.to(self.last(self.first(x.flatten(1))).dtype) * 1e-5


def test_outputs_are_looked_at_before_another_half_precision_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audited, "is_in_hardware", lambda dtype, device: True)
    model, (x, y) = Either(60.0).eval(), images(11)
    x[:, 0, 0, 0] = (torch.arange(11) == 8).float()
    fast = FastAttackModel(model, dtype=torch.float16)
    with pytest.warns(FastAttackWarning, match=r"outputs of 1 samples overflow; it runs in torch\.float32 from now on"):
        input_gradient(fast, x, y)
    assert (cosine(input_gradient(fast, x, y), input_gradient(model, x, y)) > 0.9999).all()


@pytest.mark.parametrize(("zero", "instead"), [(0, torch.float32), (3, torch.bfloat16)])
def test_what_lacks_digits_gets_no_half_precision_with_fewer(
    monkeypatch: pytest.MonkeyPatch, zero: int, instead: torch.dtype
) -> None:
    findings = iter([Finding(8, zero, 0.1)])

    def look(problem: audit.Problem, found: Any) -> Finding:
        problem.exact(problem.tensors)
        return next(findings, Finding(8, 0, 1.0))

    monkeypatch.setattr(auditing, "look", look)
    monkeypatch.setattr(audited, "is_in_hardware", lambda dtype, device: True)
    fast = FastAttackModel(small_net().eval(), dtype=torch.float16)
    with pytest.warns(FastAttackWarning, match=rf"gradients in torch\.float16 .* in {instead} from now on"):
        input_gradient(fast, *batch(12))
    assert fast.dtype == instead


def test_a_verdict_belongs_to_its_kind_of_call() -> None:
    model, (x, _) = Cancels().eval(), images()
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    for safe in (True, False, True):
        leaf = x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if not safe else "error")
            torch.autograd.grad(fast(leaf, safe=safe).logsumexp(1).sum(), leaf)
    assert [kind.dtype for kind in fast._networks.kinds.values()] == [torch.bfloat16, torch.float32]


class TwoTasks(nn.Module):
    """Logits of two tasks in one row; half precision serves the second one badly, and the first one is larger."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Cancels()
        self.first = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([300 * self.first(x.flatten(1)), self.second(x)], 1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    own = F.one_hot(y, 10).bool()
    return (logits.masked_fill(own, -torch.inf).amax(1) - logits[own]).sum()


@pytest.mark.parametrize("loss", [cross_entropy, margin])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_loss_on_another_part_of_the_same_output_is_audited(dtype: torch.dtype, loss: Any) -> None:
    net, (x, y) = TwoTasks().eval(), images()
    fast = FastAttackModel(net, dtype=dtype)
    for _ in range(2):
        input_gradient(fast, x, y, lambda logits, y: loss(logits[:, :10], y))
    assert fast.dtype == dtype
    of_second = partial(input_gradient, x=x, y=y, loss=lambda logits, y: loss(logits[:, 10:], y))
    with pytest.warns(FastAttackWarning, match="audit-failed"):
        of_second(fast)  # a margin of logits that were off may be that of other classes
    assert (cosine(of_second(fast), of_second(net)) > 0.97).all()  # float32 rounds, too


class Noisy(nn.Module):
    """Draws, as randomised smoothing does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x + 0.5 * torch.randn_like(x))
        return logits


class Coupled(nn.Module):
    """Centres features over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = attackable_net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits - logits.mean(0)


@pytest.mark.parametrize("kind", ["noisy", "constant", "usual"])
def test_what_is_chance_or_rounding_is_not_judged(kind: str) -> None:
    model = {"noisy": Noisy, "usual": small_net, "constant": lambda: Constant(2, 1.0)}[kind]().eval()  # type: ignore[operator]
    fast, x = FastAttackModel(model, dtype=torch.bfloat16), torch.rand(12, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAttackWarning)
        for _ in range(3):
            input_gradient(fast, x, torch.arange(12) % 5)
    assert [kind.dtype for kind in fast._networks.kinds.values()] == [torch.bfloat16]


@pytest.mark.filterwarnings("ignore:.*one loss scale serves the whole call")
def test_samples_that_see_each_other_are_judged_together() -> None:
    fast, (x, y) = FastAttackModel(Coupled().eval(), dtype=torch.bfloat16), batch(12)
    input_gradient(fast, x, y)
    assert [kind.dtype for kind in fast._networks.kinds.values()] == [torch.bfloat16]


SOURCE = np.random.default_rng(1)


class Elsewhere(nn.Module):
    """Noise of a generator that nobody can look at, large beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits + torch.as_tensor(SOURCE.normal(size=logits.shape), dtype=logits.dtype)


def test_noise_of_any_source_is_not_taken_for_outputs_that_are_off() -> None:
    fast, (x, y) = FastAttackModel(Elsewhere().eval(), dtype=torch.bfloat16), batch(12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAttackWarning)
        input_gradient(fast, x, y)
    assert [kind.dtype for kind in fast._networks.kinds.values()] == [torch.bfloat16]


class Placed(nn.Module):
    """Noise of a generator that is seeded anew in every pass: each place in the batch has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn((x.shape[1], len(x), *x.shape[2:]), generator=torch.Generator().manual_seed(5))
        logits: Tensor = self.net(x + 0.3 * noise.transpose(0, 1))
        return logits


class Unanimous(nn.Module):
    """An early exit that is taken if all samples agree to it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.exit = small_net(), nn.Sequential(nn.Flatten(), nn.Linear(192, 5))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.exit(x) if bool((x[:, 0, 0, 0] < 0.9).all()) else self.net(x)
        return logits


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("model", [Placed, Unanimous])
def test_samples_that_are_others_by_themselves_are_judged_in_their_batch(
    model: type[nn.Module], dtype: torch.dtype
) -> None:
    plain, (x, y) = model().eval(), batch(24)
    x = x.clamp(0, 1) * 0.8
    x[-1, 0, 0, 0] = 1.0
    truth, fast = input_gradient(plain, x, y), FastAttackModel(plain, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAttackWarning)
        found = input_gradient(fast, x, y)
    assert [kind.dtype for kind in fast._networks.kinds.values()] == [dtype]
    assert cosine(found, truth).median() > 0.98


class Amplified(nn.Module):
    """Values that float16 does not hold where the first pixel is lit, taken back by the layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(48, 32), nn.Linear(32, 10)
        with torch.no_grad():
            self.first.weight.normal_(generator=torch.Generator().manual_seed(0))
            self.first.weight[:, 0] = 1e5
            self.last.weight.normal_(generator=torch.Generator().manual_seed(1)).div_(1e5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(x.flatten(1)))
        return logits


@pytest.mark.parametrize("lit", [range(12), range(6, 12)], ids=["all", "not the first"])
def test_outputs_that_overflow_in_half_precision_alone_are_not_taken_for_an_overflow_on_the_way_back(
    lit: range,
) -> None:
    model, (x, y) = Amplified().eval(), images(12)
    x[:, 0, 0, 0] = torch.tensor([float(sample in lit) for sample in range(12)])
    fast, truth = FastAttackModel(model, dtype=torch.float16), input_gradient(model, x, y)
    with pytest.warns(FastAttackWarning, match=r"in (torch\.)?float32"):
        input_gradient(fast, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (cosine(input_gradient(fast, x, y), truth) > 0.99).all()


def test_audits_are_seldom(looks: list[int]) -> None:
    model, (x, y) = small_net().eval(), batch(12)
    fast = FastAttackModel(model, dtype=torch.bfloat16)

    def passes(number: int) -> list[int]:
        looks.clear()
        for _ in range(number):
            input_gradient(fast, x, y)
        return looks

    assert passes(1)[0] == SAMPLES
    for wait in (SOON, PASSES):
        assert passes(wait - 1) == []
        assert passes(1)[0] == SAMPLES
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    assert passes(PASSES // 2 - 1) == []
    assert passes(1)[0] == SAMPLES


@pytest.mark.parametrize("doubtful", [False, True])
@pytest.mark.usefixtures("as_on_a_device")
def test_on_an_accelerator_later_audits_wait_for_nothing(
    doubtful: bool, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they have found is read by the next pass, which is audited in full if there is a doubt."""
    monkeypatch.setattr(audited, "_is_never_to_wait", lambda device: True)
    monkeypatch.setattr(audit, "state_on", DeviceState)
    model, (x, y) = small_net().eval(), batch(12)
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    input_gradient(fast, x, y)
    assert looks == [SAMPLES]
    (kind,) = fast._networks.kinds.values()
    kind.schedule.passes = PASSES
    if doubtful:
        monkeypatch.setattr(glimpse, "NEAR", 2.0)
    leaf = x.clone().requires_grad_()
    loss = F.cross_entropy(fast(leaf), y)
    with refuse_what_waits(torch.device("cpu")):
        loss.backward()
    assert kind.glimpse is not None
    assert kind.glimpse.is_doubtful() == doubtful
    for _ in range(2):
        input_gradient(fast, x, y)
    assert looks == [SAMPLES] * (1 + doubtful)
    assert vars(kind)["glimpse"] is None
    assert kind.dtype == torch.bfloat16


def test_a_step_is_tried_on_the_worst_half_first() -> None:
    """Gradients that turn by a little are told by one forward pass more; a wrong one by a closer look, as before."""
    model, x = small_net().eval(), torch.rand(8, 3, 8, 8)
    ran: list[int] = []

    def run(tensors: Any) -> Any:
        ran.append(len(tensors[0]))
        return Packed(model(tensors[0]))

    def finding(turned: float) -> Finding:
        ran.clear()
        exact = input_gradient(model, x, torch.arange(8) % 5)
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        (grads,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(8) % 5), logits)
        torch.manual_seed(0)
        noise = torch.randn_like(exact)
        lengths = [t.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for t in (exact, noise)]
        noise *= turned * lengths[0] / lengths[1]
        return audit.look(audit.Problem(cast(Any, run), [x], [True], [grads], apart=True), [exact + noise])

    good = finding(0.2)
    assert 0.97 < good.cosine < 0.99
    assert good.good
    assert ran == [8, 8]
    assert not finding(3.0).good
    assert ran == [8, 8, 8, 8, 8, 8]


def test_samples_without_a_gradient_do_not_fill_an_audit() -> None:
    """Many samples for which nothing comes in, or that have no gradient in any precision, hide no others."""
    model, (x, y) = CancelsLater().eval(), images_for_later(24)

    def some(logits: Tensor, y: Tensor) -> Tensor:
        weights = (torch.arange(24) >= 16).to(logits.dtype)
        return (F.cross_entropy(logits, y, reduction="none") * weights).sum()

    with pytest.warns(FastAttackWarning, match="audit-failed"):
        input_gradient(FastAttackModel(model, dtype=torch.bfloat16), x, y, some)
    peaks = torch.tensor([0.0] * 12 + [3.0, 2.0, 1.0, 4.0, 5.0, 6.0])[:, None]
    grads = torch.ones(18, 10)
    grads[12] = 0
    assert audit.choose([peaks], [grads]).tolist() == [0, 1, 2, 14, 15, 17]


def test_a_pass_in_which_nothing_comes_in_is_no_audit(looks: list[int]) -> None:
    fast, (x, y) = FastAttackModel(small_net().eval(), dtype=torch.bfloat16), batch(12)
    for loss in (lambda logits, y: (logits * 0).sum(), F.cross_entropy):
        assert not looks
        input_gradient(fast, x, y, loss)
    assert looks


@pytest.mark.filterwarnings("ignore:.*one loss scale serves the whole call")
def test_samples_that_share_a_scale_are_judged_by_gradients_that_do() -> None:
    torch.manual_seed(0)
    model, (x, y) = Coupled().eval(), batch(12)
    fast = FastAttackModel(model, dtype=torch.bfloat16)

    def uneven(logits: Tensor, y: Tensor) -> Tensor:
        return (F.cross_entropy(logits, y, reduction="none") * 4.0 ** -torch.arange(12)).sum()

    found = input_gradient(fast, x, y, uneven)
    assert "not good enough" not in fast.summary()
    assert cosine(found, input_gradient(model, x, y, uneven)).median() > 0.9


def test_a_sample_that_full_precision_does_not_bear_hides_nothing() -> None:
    x = torch.rand(4, 3)
    weights = torch.tensor([torch.inf, 1.0, 1.0, 1.0])[:, None]

    def run(tensors: Any) -> Any:
        return Packed(tensors[0] * weights)

    problem = audit.Problem(cast(Any, run), [x], [True], [torch.ones(4, 3)], apart=True)
    wrong = torch.tensor([[1.0, -1.0, 1.0]]).expand(4, 3)
    found = audit.look(problem, [wrong])
    assert found.cosine == pytest.approx(1 / 3)
    assert not found.good


def left_out(logits: Tensor) -> Tensor:
    logits[:, 5:] = -torch.inf
    return logits


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "left-out": left_out,
    "temperature": lambda logits: logits.div_(0.05),
    "shifted": lambda logits: logits.sub_(logits.amax(1, keepdim=True).detach()),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_the_caller_writes_into_the_outputs_is_not_taken_for_theirs(dtype: torch.dtype, name: str) -> None:
    """Also with several passes on the way: an update for old weights would have broken the backward pass."""
    net, (x, y) = attackable_net(), batch(16)
    write, y = WRITES[name], y % 5
    fast = FastAttackModel(net, dtype=dtype)

    def twice(model: nn.Module) -> Tensor:
        return input_gradient(lambda images: write(model(images)) + write(model(images.flip(3))), x, y)

    assert (cosine(twice(fast), twice(net)) > 0.95).all()
    assert fast.dtype == dtype


def test_an_audit_leaves_no_trace() -> None:
    model, (x, y) = small_net().eval(), batch(12)
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    torch.manual_seed(3)
    input_gradient(fast, x, y)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))
    assert fast.gradient_stats == (1, 12, 0, 0, 0)
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_were_changed_past_pytorch_are_noticed_at_the_next_audit() -> None:
    model, (x, y) = small_net().eval(), batch(12)
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    input_gradient(fast, x, y)
    for parameter in model.parameters():
        between_the_ends(parameter).mul_(1.3)
    for _ in range(SOON - 1):
        input_gradient(fast, x, y)
    with pytest.warns(FastAttackWarning, match="changed where PyTorch records nothing.*#old-weights"):
        found = input_gradient(fast, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = input_gradient(fast, x, y)
    for gradient in (found, again):
        assert (cosine(gradient, input_gradient(model, x, y)) > 0.9).all()


class LossAlone(nn.Module):
    """Returns its own loss, a number, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x) * 100, y)


def test_a_number_for_the_whole_call_tells_of_old_weights_too() -> None:
    model, (x, y) = LossAlone().eval(), batch(12)
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.autograd.grad(fast(x.requires_grad_(), y), x)
    between_the_ends(head_of(model.net).weight).mul_(-1)
    (kind,) = fast._networks.kinds.values()
    kind.schedule.passes = PASSES
    with pytest.warns(FastAttackWarning, match="#old-weights"):
        torch.autograd.grad(fast(x, y), x)


def test_a_network_made_anew_rounds_as_the_one_in_use() -> None:
    """Else outputs that cancel are near by the one and off by the other, and weights seem to have changed."""
    model, (x, y) = small_net().eval(), batch(12)
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    input_gradient(fast, x, y)
    networks = fast._networks
    (kind,) = networks.kinds.values()
    outputs = []
    for network in (networks.network_in(torch.bfloat16), networks._made_anew(networks.network_in(torch.bfloat16))):
        with torch.no_grad(), ends_of(kind.rows.ends, "cpu"):
            outputs.append(network.eager().bind(Packed(((x,), {})))([x]).tensors[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("shortfalls", "dtype"), [((True, False, True), torch.bfloat16), ((True, True), torch.float32)]
)
def test_few_samples_have_to_fall_short_twice_in_a_row(
    shortfalls: tuple[bool, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = small_net().eval(), batch(1)
    fast, told = FastAttackModel(model, dtype=torch.bfloat16), list[bool]()

    def judge(self: auditing.Auditor, tensors: Any, needs: Any, grads: Any, pulled: Any) -> Any:
        problem, found = original(self, tensors, needs, grads, pulled)
        told.append(shortfalls[len(told)])
        return problem, replace(found, cosine=0.9, gain=0.9, least=0.9) if told[-1] else found

    original: Any = auditing.Auditor._judge
    monkeypatch.setattr(auditing.Auditor, "_judge", judge)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for asked in range(len(shortfalls)):
            if asked and not shortfalls[asked - 1]:
                next(iter(fast._networks.kinds.values())).schedule.passes = None
            input_gradient(fast, x, y)
    assert len(told) == len(shortfalls), "the pass after a shortfall is audited"
    assert fast.dtype == dtype
    assert len(caught) == (dtype == torch.float32)
