"""What brings an audit forward: other outputs, far weights, vanished gradients; and what is no audit."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.boundary import HostState
from fastadv_adapters.modules import precision
from fastadv_adapters.networks import audit, auditing
from fastadv_adapters.networks.finding import SAMPLES
from fastadv_adapters.networks.schedule import CURED, PASSES, PATIENCE, SETTLED, SOON, Schedule, _few_entries
from tests.networks.test_losing import Angles, bright_from, same_inputs  # noqa: F401  # a fixture
from tests.support.tools import attackable_net, batch, cosine, input_gradient, small_net


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    look = audit.look

    def counted(problem: Any, gradients: Any) -> Any:
        found.append(len(problem.tensors[0]))
        return look(problem, gradients)

    monkeypatch.setattr(auditing, "look", counted)
    return found


class Votes(nn.Module):
    """A sharp softmax between two products, in which the gradients of bright images vanish in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = attackable_net(), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        sharpness = torch.where(x[:, 0, 0, :1] > 0.3, 20.0, 0.1)
        logits: Tensor = self.last((self.body(x) * sharpness).softmax(1)) * 3
        return logits


def test_a_blank_pass_is_no_audit(looks: list[int]) -> None:
    fast, (x, y) = FastAttackModel(small_net().eval(), dtype=torch.bfloat16), batch(12)
    for value in (0.0, 0.5):
        input_gradient(fast, torch.full_like(x, value), y)
    assert not looks
    input_gradient(fast, x, y)
    assert looks


def test_gradients_that_vanish_pass_after_pass_bring_the_audit_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: False)  # else bfloat16 may be good enough
    model, (x, y) = Votes().eval(), batch(32)
    fast = FastAttackModel(model, dtype=torch.float16, engine="eager")
    fast._networks.state = HostState(torch.device("cpu"))
    x[:, 0, 0, 0] = 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        input_gradient(fast, x, y)
    x[:, 0, 0, 0] = 1.0
    for _ in range(PATIENCE + CURED - 1):
        input_gradient(fast, x, y)
    assert fast.gradient_stats.zero > 0
    with pytest.warns(FastAttackWarning, match="no gradient.*#audit-failed"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(model, x, y)) > 0.99).all()


def test_what_an_audit_has_found_to_be_right_brings_none_forward_again() -> None:
    schedule = Schedule()
    assert [schedule.is_losing(3, curable=False) for _ in range(2)] == [False, True]
    schedule.was_right(8, nn.Linear(2, 2), saw_lost=True)
    assert not any(schedule.is_losing(3, curable=False) for _ in range(20))
    schedule.was_right(8, nn.Linear(2, 2), saw_lost=False)
    assert [schedule.is_losing(4, curable=False) for _ in range(4)] == [False] * 3 + [True], "more, twice as patient"


@pytest.mark.parametrize("lost_first", [16, 12])
def test_samples_that_no_audit_has_seen_are_not_taken_for_right(lost_first: int) -> None:
    """In the first pass in float16 lost ones are left out: a lower scale may cure them."""
    model, (x, y) = Angles(when_bright=0.3).eval(), bright_from(16 - lost_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = FastAttackModel(model, dtype=torch.float16, engine="eager")
        fast(bright_from(16)[0].requires_grad_())  # the self-check sees dark ones
        fast._networks.state = HostState(torch.device("cpu"))
        for _ in range(PATIENCE + CURED):
            input_gradient(fast, x, y)
    assert fast.dtype == torch.float32


class Flagged(nn.Module):
    """A gradient that is NaN in every precision, if the caller asks for that; else as `Angles`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Angles(when_bright=0.3)

    def forward(self, x: Tensor, *, broken: bool = False) -> Tensor:
        logits: Tensor = self.net(x)
        return logits + (x - x).flatten(1).square().sum(1, keepdim=True).sqrt() if broken else logits


@pytest.mark.usefixtures("same_inputs")
def test_what_one_kind_of_call_loses_is_not_put_down_to_another() -> None:
    model = Flagged().eval()
    fast = FastAttackModel(model, dtype=torch.bfloat16, engine="eager")
    fast._networks.state = HostState(torch.device("cpu"))
    dark, y = bright_from(16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            leaf = dark.clone().requires_grad_()
            F.cross_entropy(fast(leaf, broken=True), y).backward()
    assert fast.gradient_stats.nonfinite > 0
    input_gradient(fast, dark, y)
    x, _ = bright_from(4)
    for _ in range(PATIENCE - 1):
        input_gradient(fast, x, y)
    with pytest.warns(FastAttackWarning, match="audit-failed"):
        input_gradient(fast, x, y)


def test_counts_that_are_reset_bring_no_audit_forward(looks: list[int]) -> None:
    model, (x, y) = Flagged().eval(), bright_from(16)
    fast = FastAttackModel(model, dtype=torch.bfloat16, engine="eager")
    fast._networks.state = HostState(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            leaf = x.clone().requires_grad_()
            F.cross_entropy(fast(leaf, broken=True), y).backward()
        fast.reset_gradient_stats()
        input_gradient(fast, x, y)
        looked = len(looks)
        for _ in range(8):
            input_gradient(fast, x, y)
    assert len(looks) == looked


def test_an_audit_that_runs_out_of_memory_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, (x, y) = FastAttackModel(small_net().eval(), dtype=torch.bfloat16), batch(12)

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(auditing, "look", exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            input_gradient(fast, x, y)
    (kind,) = fast._networks.kinds.values()
    assert kind.schedule.passes is None
    input_gradient(fast, x, y)
    assert kind.schedule.passes == 0


def test_a_random_model_that_is_not_followed_is_judged_as_of_its_last_update() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Jitter(0.001), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    fast, x, y = (
        FastAttackModel(model, dtype=torch.bfloat16, auto_update=False),
        torch.rand(16, 16),
        torch.arange(16) % 10,
    )
    input_gradient(fast, x, y)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(SOON):
            input_gradient(fast, x, y)
    assert fast.dtype == torch.bfloat16


def test_what_an_idle_pass_has_asked_for_is_audited_when_it_comes(looks: list[int]) -> None:
    fast, (x, y) = FastAttackModel(Heads().eval(), dtype=torch.bfloat16), batch(12)
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place, factor in ((0, 1.0), (1, 0.0), (1, 1.0)):
            input_gradient(fast, x, y, lambda found, y, place=place, factor=factor: found[place].sum() * factor)  # type: ignore[misc]
            counts.append(len(looks))
    assert counts[0] == counts[1] < counts[2]


def test_weights_of_every_layout_can_be_compared() -> None:
    model, (x, y) = small_net(), batch(12)
    model.register_buffer("places", torch.eye(3).to_sparse())
    model.register_buffer("none", torch.zeros(0))
    input_gradient(FastAttackModel(model.eval(), dtype=torch.bfloat16), x, y)
    assert len(_few_entries(model)) == len([*model.parameters(), *model.buffers()]) - 2 - batch_counts(model)


def batch_counts(model: nn.Module) -> int:
    return sum(name.endswith("num_batches_tracked") for name, _ in model.named_buffers())


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sure, self.votes = attackable_net(), Votes()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.sure(x), self.votes(x)


def test_other_outputs_that_are_asked_for_are_audited_at_once(looks: list[int]) -> None:
    fast, (x, y) = FastAttackModel(Heads().eval(), dtype=torch.bfloat16), batch(12)
    losses = [lambda found, y: F.cross_entropy(found[0], y), lambda found, y: F.cross_entropy(found[1], y)]
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in (0, 0, 1, 1, 0):
            input_gradient(fast, x, y, losses[place])
            counts.append(len(looks))
    assert counts[0] == counts[1] < counts[2] == counts[3] == counts[4]


def test_another_checkpoint_is_audited_at_once_and_a_step_of_training_is_not(looks: list[int]) -> None:
    model, (x, y) = attackable_net(), batch(12)
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    for _ in range(SETTLED):
        input_gradient(fast, x, y)
    assert len(looks) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    input_gradient(fast, x, y)
    assert len(looks) == 1
    other = attackable_net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flip(0))
    model.load_state_dict(other.state_dict())
    input_gradient(fast, x, y)
    assert len(looks) == 2


def test_a_pass_of_the_plain_model_in_between_puts_no_audit_off(looks: list[int]) -> None:
    """As in TRADES: statistics of batch norms move, and the weights that the twin runs on do not."""
    model, (x, _) = attackable_net().train(), batch(12)
    for _ in range(40):
        model(x)
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        found = F.log_softmax(fast(leaf), 1)
        wanted = model(x).softmax(1).detach()
        F.kl_div(found, wanted, reduction="batchmean").backward()
    assert len(looks) == 1


def test_the_first_pass_after_another_checkpoint_is_audited(looks: list[int]) -> None:
    model, (x, y) = attackable_net(), batch(12)
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    for number in range(1, 4):
        input_gradient(fast, x, y)
        assert len(looks) == min(number, 2), "in steep training weights go far in every step"
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.flip(0))


def test_after_another_checkpoint_outputs_are_as_large_as_its_own() -> None:
    model, (x, y) = attackable_net(), batch(12)
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    usual = []
    for factor in (100.0, 0.01):
        with torch.no_grad():
            list(model.parameters())[-1].mul_(factor)
            list(model.parameters())[-2].mul_(factor)
        for _ in range(SETTLED + 1):
            input_gradient(fast, x, y)
        (kind,) = fast._networks.kinds.values()
        usual.append(kind.usual[0])
    assert usual[1] < 0.1 * usual[0]


def test_passes_of_few_samples_are_audited_the_more_often(looks: list[int]) -> None:
    fast, (x, y) = FastAttackModel(attackable_net(), dtype=torch.bfloat16), batch(2)
    for _ in range(SOON * 2 // SAMPLES + 1):
        input_gradient(fast, x, y)
    assert looks == [2, 2]


def test_the_second_audit_comes_soon() -> None:
    schedule, source = Schedule(), small_net()
    due = [number for number in range(SOON + PASSES + 2) if schedule.is_due(0, "all", source)]
    assert due == [0, SOON, SOON + PASSES]


class Shared(nn.Module):
    """All logits have a large part in common, whose gradient hides the rest of each."""

    def __init__(self, size: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 32), nn.ReLU())
        self.each, self.all, self.size = nn.Linear(32, 10), nn.Linear(32, 1), size

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        logits: Tensor = self.each(features) + self.size * self.all(features)
        return logits


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("size", "dtype"), [(0.0, torch.bfloat16), (1e3, torch.float32)])
def test_single_logits_are_judged_by_their_differences(size: float, dtype: torch.dtype, *, weighted: bool) -> None:
    fast, (x, _) = FastAttackModel(Shared(size).eval(), dtype=torch.bfloat16), batch(16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = torch.linspace(1e-3, 1, 16) if weighted else torch.ones(16)
        input_gradient(fast, x, torch.zeros(16, dtype=torch.long), lambda logits, y: (weights * logits[:, 3]).sum())
    assert [kind.dtype for kind in fast._networks.kinds.values()] == [dtype]


@pytest.mark.parametrize("samples", [1, 16])
def test_what_a_cross_entropy_leaves_of_confident_samples_is_no_single_logit(samples: int) -> None:
    """The softmax of these is one at the label: the entry there rounds to zero, and that of the next class is left."""
    fast, (x, y) = FastAttackModel(Shared(1e3).eval(), dtype=torch.bfloat16), batch(16)
    x, y = x[:samples], y[:samples]
    given: list[Tensor] = []

    def surest(logits: Tensor, y: Tensor) -> Tensor:
        wanted = F.one_hot(y, 10) * 120.0 + F.one_hot((y + 1) % 10, 10) * torch.linspace(90, 100, len(y))[:, None]
        logits.register_hook(given.append)
        return F.cross_entropy(logits + (wanted - logits).detach(), y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        input_gradient(fast, x, y, surest)
    assert [int((g != 0).sum(1).max()) for g in given] == [1]
    assert [kind.dtype for kind in fast._networks.kinds.values()] == [torch.bfloat16]


@pytest.mark.parametrize("samples", [4, 8, 16])
@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_noise_alone_is_no_reason(noise: float, samples: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(Jitter(noise), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
        fast, y = FastAttackModel(model, dtype=torch.bfloat16), torch.arange(samples) % 10
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            input_gradient(fast, torch.rand(samples, 16), y)
        assert [kind.dtype for kind in fast._networks.kinds.values()] == [torch.bfloat16]


class Jitter(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x + self.size * torch.randn_like(x)


class Noisy(nn.Module):
    """Noise in front of a part that half precision rounds away, or of one that it does not."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.body, self.number = attackable_net(), number

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body[0](x + 0.5 * torch.randn_like(x))
        logits: Tensor = self.body[1:]((hidden + self.number) - self.number)
        return F.dropout(logits, 0.1, training=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("number", "dtype"), [(0.0, torch.bfloat16), (2e3, torch.float32)])
def test_random_models_are_judged_by_the_same_draws(number: float, dtype: torch.dtype, *, channels_last: bool) -> None:
    model, (x, y) = Noisy(number).eval(), batch(16)
    fast = FastAttackModel(model, dtype=torch.bfloat16, channels_last=channels_last)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        input_gradient(fast, x, y)
    assert [kind.dtype for kind in fast._networks.kinds.values()] == [dtype]
    found = []
    for _ in range(2):  # later passes, of which none is audited
        torch.set_rng_state(state)
        input_gradient(fast, x, y)
        found.append(torch.get_rng_state())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], state), "a pass draws"
