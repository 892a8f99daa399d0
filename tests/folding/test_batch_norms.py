"""How far folding reaches: one model with every kind of batch norm there is a way for, and no batch norm operator."""

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from fastadv_adapters.folding import build_fast, own_forward, tracing
from tests.support.tools import CountOperators, batch, cosine, input_gradient, reference, settle

FLOAT32: Any = {"dtype": torch.float32}


class ActivatedNorm(nn.BatchNorm2d):
    """With an activation as a layer."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.act(super().forward(input))
        return out


class DroppedNorm(nn.BatchNorm2d):
    """With dropout and an activation, both optional, and the bookkeeping of training written out, as libraries do."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout2d(0.5), nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        by_batch = True if self.training else self.running_mean is None and self.running_var is None
        mean = self.running_mean if not self.training or self.track_running_stats else None
        variance = self.running_var if not self.training or self.track_running_stats else None
        x = F.batch_norm(x, mean, variance, self.weight, self.bias, by_batch, momentum, self.eps)
        out: Tensor = self.act(self.drop(x))
        return out


class FunctionalDrop(nn.BatchNorm1d):
    """With dropout as a function, which does nothing in eval mode."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(F.relu(super().forward(input)), 0.5, self.training)


class Undecided(nn.Module):
    """Looks at its values, so that it does not trace; its parts do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Dropout(), nn.Identity(), nn.BatchNorm2d(6))
        self.second = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        if float(y.detach().abs().max()) > -1:
            y = self.second(y)
        return y


class Everything(nn.Module):
    """Images (N, 4, 8, 8) to logits, through one of each."""

    def __init__(self) -> None:
        super().__init__()
        self.activated = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), ActivatedNorm(6))
        self.dropped = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=3), DroppedNorm(6))
        self.chain = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Dropout(), nn.Identity(), nn.Dropout2d(), nn.BatchNorm2d(6))
        self.transposed = nn.Sequential(nn.ConvTranspose2d(6, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6), nn.ReLU())
        self.undecided = Undecided()
        self.before = nn.ModuleList([nn.BatchNorm2d(6), ActivatedNorm(6), DroppedNorm(6)])  # behind sums, so frozen
        self.conv = nn.Conv2d(6, 6, 3, stride=2, bias=False)
        self.sync = nn.SyncBatchNorm(6)
        self.line = nn.Sequential(nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.ConvTranspose1d(6, 5, 2))
        self.line_norm = nn.BatchNorm1d(5)
        self.head = nn.Sequential(nn.Linear(5, 8, bias=False), FunctionalDrop(8), nn.Linear(8, 5), nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropped(self.activated(x))
        x = self.undecided(self.transposed(F.relu(self.chain(x))))
        for norm in self.before:
            x = x + norm(x)
        x = self.sync(self.conv(x))
        x = self.line_norm(self.line(x.flatten(2)))
        out: Tensor = self.head(x.mean(2))
        return out


@pytest.fixture
def net() -> nn.Module:
    return settle(Everything()).eval()


def counted(model: nn.Module, x: Tensor) -> CountOperators:
    operators = CountOperators()
    with operators:
        model(x.clone().requires_grad_())
    return operators


def norms_in(operators: CountOperators) -> int:
    return sum(number for name, number in operators.calls.items() if "batch_norm" in name)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_batch_norm_operator_is_left(net: nn.Module, dtype: torch.dtype) -> None:
    x = torch.rand(3, 4, 8, 8)
    assert norms_in(counted(net, x)) == 14
    fast = FastAttackModel(net, dtype=dtype, engine="eager")
    fast(x.clone().requires_grad_())  # the self-check at the first call runs the plain network too
    operators = counted(fast, x)
    assert norms_in(operators) == 0, fast.summary()
    assert not fast._networks.notes
    done = [text.split()[0] for text in fast._networks.folded.report.values()]
    assert Counter(done) == {"folded": 10, "frozen": 4}


def test_every_fold_is_right(net: nn.Module) -> None:
    outcomes = []
    for model, dtype in ((FastAttackModel(net, dtype=torch.float32), torch.float32), (reference(net), torch.float64)):
        x = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        output = model(x)
        outcomes.append((output.detach().double(), torch.autograd.grad(output.sin().sum(), x)[0].double()))
    for found, wanted in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_frozen_norms_work_in_the_dtype_of_what_they_read(dtype: torch.dtype) -> None:
    body = [layer for _ in range(3) for layer in (nn.BatchNorm2d(4), nn.ReLU())]
    net = settle(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), *body, nn.Conv2d(4, 4, 1), nn.Flatten()))
    fast = FastAttackModel(net, dtype=dtype, engine="eager")
    x = torch.rand(2, 4, 10, 10)
    fast(x.clone().requires_grad_())
    assert counted(fast, x).dtypes["addcmul"] == [(dtype,) * 4] * 3


class ReadsNorm(nn.Module):
    """Reads a batch norm's tensors beside calling it, or instead of that."""

    def __init__(self, *, functional: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.functional = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), functional
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        norm, x = self.norm, self.conv(x)
        if self.functional:
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        else:
            x = norm(x) * norm.weight.view(-1, 1, 1)
        out: Tensor = self.head(torch.tanh(x).mean((2, 3)))
        return out


@pytest.mark.parametrize("auto_update", [True, False])
@pytest.mark.parametrize("functional", [True, False])
def test_tensors_of_a_batch_norm_that_other_code_reads_are_followed(functional: bool, auto_update: bool) -> None:
    net, (x, y) = ReadsNorm(functional=functional).eval(), batch()
    fast = FastAttackModel(net, **FLOAT32, auto_update=auto_update)
    before = input_gradient(fast, x, y)
    net.norm.weight = nn.Parameter(torch.linspace(-2, 2, 8))
    with torch.no_grad():
        net.norm.bias.add_(1.0)
    if not auto_update:
        torch.testing.assert_close(input_gradient(fast, x, y), before)
    fast.update()
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference(net), x.double(), y)) > 0.9999).all()


def test_each_batch_norm_with_a_forward_of_its_own_is_traced_once_for_all_networks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced, original = Counter[int](), own_forward.reads_first

    def counted(norm: nn.Module) -> Any:
        traced[len(norm.weight)] += 1  # type: ignore[arg-type]
        return original(norm)

    monkeypatch.setattr(own_forward, "reads_first", counted)
    parts = (
        nn.Conv2d(3, 4, 3),
        ActivatedNorm(4),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        ActivatedNorm(5),
        nn.ReLU(),
        ActivatedNorm(5),
    )
    net = settle(nn.Sequential(*parts, nn.Flatten(), nn.Linear(80, 10))).eval()
    fast, (x, y) = FastAttackModel(net, dtype=torch.bfloat16), batch()
    found = input_gradient(fast, x, y)  # the self-check builds two more
    with torch.no_grad():
        fast(x)  # and this one more
    assert traced == {4: 1, 5: 1}, "two of five channels are alike"
    done = [done.split()[0] for done in fast._networks.folded.report.values()]
    assert done == ["folded", "frozen", "frozen"]
    assert (cosine(found, input_gradient(reference(net), x.double(), y)) > 0.98).all()


def test_batch_norms_that_differ_in_an_attribute_are_traced_by_themselves() -> None:
    other = ActivatedNorm(4)
    other.act = nn.Tanh()  # type: ignore[assignment]
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3), ActivatedNorm(4), nn.ReLU(), other, nn.Flatten())).eval()
    fast, (x, _) = FastAttackModel(net, dtype=torch.float32, decisions="fast"), batch()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert [done.split()[0] for done in fast._networks.folded.report.values()] == ["folded", "frozen"]


class SlopedNorm(nn.BatchNorm2d):
    """With a parameter and a buffer of its own."""

    lift: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.register_buffer("lift", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(super().forward(input), self.slope) + self.lift


class ConstantNorm(nn.BatchNorm2d):
    """With a tensor that nobody could follow."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.tensor(2.0)


class ReshapedNorm(nn.BatchNorm2d):
    """Asks how many samples there are."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).reshape(len(input), self.num_features, -1, input.shape[3]) / len(input)


def with_norm(norm: nn.Module) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 36, 5))
    return settle(net).eval()  # type: ignore[return-value]


def by_storage(norm: Any) -> None:
    norm.slope.data = torch.full((4,), -1.0)
    norm.lift = torch.tensor(3.0)


def in_place(norm: Any) -> None:
    with torch.no_grad():
        norm.slope.fill_(-1.0)
        norm.lift.fill_(3.0)


@pytest.mark.parametrize("change", [by_storage, in_place])
@pytest.mark.parametrize("behind_a_sum", [False, True])
def test_what_a_subclass_has_of_its_own_is_followed(change: Any, *, behind_a_sum: bool) -> None:
    x = torch.rand(4, 3, 8, 8)
    net = with_norm(SlopedNorm(4))
    if behind_a_sum:
        net.insert(1, nn.Conv2d(4, 4, 1))
        net.insert(2, Doubled())
    fast = FastAttackModel(net.eval(), **FLOAT32)
    y = torch.arange(4)
    for _ in range(2):
        assert (cosine(input_gradient(fast, x, y), input_gradient(reference(net), x.double(), y)) > 0.9999).all()
        change(next(part for part in net if isinstance(part, SlopedNorm)))
    assert not fast._networks.notes


class Doubled(nn.Module):
    """A sum, behind which a batch norm is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x


@pytest.mark.parametrize("kind", [ConstantNorm, ReshapedNorm])
def test_a_subclass_whose_trace_would_not_stand_for_it_is_kept(kind: Any) -> None:
    net = with_norm(kind(4))
    fast = FastAttackModel(net, **FLOAT32)
    for samples in (2, 5):
        x, y = torch.rand(samples, 3, 8, 8), torch.arange(samples)
        assert (cosine(input_gradient(fast, x, y), input_gradient(reference(net), x.double(), y)) > 0.9999).all()
    assert fast._networks.folded.report["1"].startswith("kept: its own forward")
    assert not fast._networks.notes


class PartedNorm(SlopedNorm):
    """With parts, one of them deep inside, and one that is None."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.extra: nn.Module | None
        self.register_module("extra", None)
        self.rest = nn.Sequential(nn.Sequential(nn.Conv2d(channels, channels, 1)), nn.SiLU())

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        inner: Any = self.rest[0]
        mixed: Tensor = inner[0](out if self.extra is None else self.extra(out))
        return mixed.sigmoid()


@pytest.mark.parametrize("kind", [SlopedNorm, PartedNorm])
def test_norms_that_are_alike_share_code_and_nothing_else(kind: type[SlopedNorm]) -> None:
    torch.manual_seed(0)
    norms = [kind(4) for _ in range(4)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.Conv2d(4, 4, 1), norms[1], Doubled(), norms[2], norms[3])
    net = settle(nn.Sequential(*net, nn.Flatten(), nn.Linear(4 * 36, 5))).eval()  # type: ignore[assignment]
    with torch.no_grad():
        for norm in norms:
            norm.slope.normal_()
            norm.lift.normal_()
    fast, x, y = FastAttackModel(net, **FLOAT32), torch.rand(4, 3, 8, 8), torch.arange(4)
    other = FastAttackModel(net, **FLOAT32)
    for run in (fast, other, fast):
        assert (cosine(input_gradient(run, x, y), input_gradient(reference(net), x.double(), y)) > 0.9999).all()
        with torch.no_grad():
            norms[1].slope.normal_()
            norms[2].lift.normal_()
    hooked = fast._networks.folded.network.get_submodule("1")
    hooked.register_forward_hook(lambda *_: None)
    assert not fast._networks.folded.network.get_submodule("3")._forward_hooks
    report = [done.split()[0] for done in fast._networks.folded.report.values()]
    assert report == ["folded", "folded", "frozen", "frozen"]
    assert not fast._networks.notes


@pytest.mark.parametrize("kind", [SlopedNorm, ConstantNorm])
def test_a_trace_keeps_no_network_alive_that_was_built_from_it(kind: Any) -> None:
    net = with_norm(kind(4))
    plan, precision = tracing.trace(net), FastAttackModel(net, **FLOAT32)._networks.precision
    build_fast(net, plan, precision)
    built = weakref.ref(build_fast(net, plan, precision).network)
    gc.collect()
    assert built() is None
