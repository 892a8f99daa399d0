"""The self-check of a first pass: made once, by whatever call comes first, per sample, and not blind to NaN."""

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from digits import grey_digits, trained_net
from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.boundary import Packed
from fastadv_adapters.modules import copy_module
from fastadv_adapters.networks import audited, selfcheck, whole
from fastadv_adapters.networks import pair as networks
from fastadv_adapters.networks.trial import Trial
from tests.support.tools import batch, cosine, input_gradient, reference, small_net

FLOAT32: Any = {"dtype": torch.float32}


def summed(logits: Tensor, _: Tensor) -> Tensor:
    return logits.logsumexp(1).sum()


class LogsWhatItFolds(nn.Module):
    """Reads the layer's output where a trace does not look; folded, the logarithm is of negative numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        with torch.no_grad():
            self.conv.weight.abs_()
            self.norm.weight.fill_(-1.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        out: Tensor = self.norm(hidden)
        if isinstance(hidden, Tensor):
            out = out + (hidden + 1e-3).log()
        return out.mean((2, 3))


def test_nan_is_not_near_enough_for_the_self_check() -> None:
    net, (x, y) = LogsWhatItFolds().eval(), batch()
    y = y % 4
    fast = FastAttackModel(net, **FLOAT32)
    with pytest.warns(FastAttackWarning, match="folded into 0 layers only"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(reference(net), x.double(), y)) > 0.9999).all()


class Lowered(nn.Module):
    """Runs a network in an autocast region of its own, as Accelerate makes it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = self.net(x)
        return out.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_lowers_itself_is_folded_for_its_rounding_is_no_wrong_fold(dtype: torch.dtype) -> None:
    net, (x, y) = Lowered(trained_net(grey_digits(), width=4, epochs=1)).eval(), (grey_digits().test_images[:8],) * 2
    plain, fast = input_gradient(net, x, y, summed), FastAttackModel(net, dtype=dtype)
    found = input_gradient(fast, x, y, summed)  # a warning would be an error
    assert "15 folded" in fast.summary()
    assert (cosine(found, plain) > 0.95).all()


def test_a_wrong_fold_of_a_model_that_lowers_itself_is_noticed() -> None:
    net, (x, y) = Lowered(LogsWhatItFolds()).eval(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    with pytest.warns(FastAttackWarning, match="folded into 0 layers only"):
        found = input_gradient(fast, x, y % 4)
    assert (cosine(found, input_gradient(net, x, y % 4)) > 0.99).all()


def test_threads_at_a_first_call_make_one_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    made, check = list[int](), selfcheck.check

    def counted(*args: Any) -> Any:
        made.append(1)
        return check(*args)

    monkeypatch.setattr(networks, "check", counted)
    fast, (x, y) = FastAttackModel(small_net().eval(), **FLOAT32), batch()
    threads = [threading.Thread(target=input_gradient, args=(fast, x, y)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_self_check_waits_for_no_thread_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator backward passes run in the device's own thread, which may wait for the lock that is held."""
    seen = list[bool]()

    def watched(run: Any) -> Any:
        def noted(*args: Any) -> Any:
            seen.append(torch._C._is_multithreading_enabled())
            return run(*args)

        return noted

    monkeypatch.setattr(networks, "check", watched(selfcheck.check))
    monkeypatch.setattr(audited, "look_at_whole", watched(whole.look_at_whole))
    input_gradient(FastAttackModel(small_net(), **FLOAT32), *batch())
    assert seen == [False, False]
    assert torch._C._is_multithreading_enabled()


def test_the_first_gradient_through_a_full_precision_view_is_checked() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3))
    x, y = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = lambda logits, y: (F.cross_entropy(logits, y, reduction="none") * 10.0 ** torch.arange(6)).sum()  # noqa: E731
    with pytest.warns(FastAttackWarning, match="one loss scale serves the whole call"):
        found = input_gradient(FastAttackModel(net, **FLOAT32).view(full_precision=True), x, y, loss)
    assert (cosine(found, input_gradient(reference(net), x.double(), y, loss)) > 0.999).all()


def test_a_self_check_copies_the_model_no_oftener_than_it_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = list[int]()

    def counted(module: nn.Module, what: Any) -> Any:
        copied.append(1)
        return copy_module(module, what)

    monkeypatch.setattr("fastadv_adapters.networks.trial.copy_module", counted)
    input_gradient(FastAttackModel(small_net(), dtype=torch.bfloat16), *batch())
    assert len(copied) == 2, "to be run and to look whether samples see each other, and for that in the whole batch"


class Counts(nn.Module):
    """Each of its runs adds to what the next one gives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LogsWhatItFolds()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) + self.runs
        self.runs += 1
        return out


def test_a_model_that_changes_with_each_run_is_checked_on_fresh_copies() -> None:
    fast, (x, y) = FastAttackModel(Counts().eval(), **FLOAT32), batch()
    with pytest.warns(FastAttackWarning, match="folded into 0 layers only"):
        input_gradient(fast, x, y % 4)


# --- whether samples see each other -----------------------------------------------------------------------------------


class SixAtATime(nn.Module):
    """A network that takes batches of six alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.view(6, 3, 8, 8))
        return out


def test_a_model_of_one_batch_size_is_scaled_per_sample_too() -> None:
    net, (x, y) = SixAtATime().eval(), batch(6)
    fast = FastAttackModel(net, dtype=torch.float16)
    weights = torch.tensor([1.0, 1e-12, 1.0, 1e-12, 1.0, 1.0])
    found = input_gradient(fast, x, y, lambda z, y: (F.cross_entropy(z, y, reduction="none") * weights).sum())
    assert all(row.count_nonzero() for row in found)
    assert "per-sample" in fast.summary()


class TimeFirst(nn.Module):
    """Gives (8, N, 3), which for eight samples looks like a batch in front."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).view(len(x), 8, 3).transpose(0, 1).tanh()
        return out


@pytest.mark.parametrize("samples", [2, 3, 4, 6, 8])
def test_an_output_as_long_as_the_batch_by_accident(samples: int) -> None:
    net, x = TimeFirst(), torch.rand(samples, 4)
    loss = lambda out, y: (out * 10.0 ** torch.arange(8)[:, None, None]).sum()  # noqa: E731
    found = input_gradient(FastAttackModel(net, **FLOAT32), x, x, loss)
    torch.testing.assert_close(
        found.double(), input_gradient(reference(net), x.double(), x, loss), rtol=1e-3, atol=1e-3
    )


class Experts(nn.Module):
    """Sends each sample to one of three experts; the last gets none of these."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(192, 32), nn.GELU(), nn.Linear(32, 10)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        chosen, logits = (flat[:, 0] > 0.5).long(), flat.new_zeros(len(x), 10)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            logits = logits.index_add(0, rows, expert(flat[rows]).to(logits.dtype))
        return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_that_gets_no_sample_speaks_not_against_half_precision(dtype: torch.dtype) -> None:
    net, (x, y) = Experts().eval(), batch(24)
    fast = FastAttackModel(net, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAttackWarning)
        found = input_gradient(fast, x, y)
    assert fast.dtype == dtype
    assert (cosine(found, input_gradient(net, x, y)) > 0.99).all()


class Doubled(nn.Module):
    """Casts to the float64 of its weights by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net().double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.double())
        return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_code_that_casts_to_float64_runs_in_float64(dtype: torch.dtype) -> None:
    net, (x, y) = Doubled().eval(), batch()
    fast = FastAttackModel(net, dtype=dtype)
    with pytest.warns(FastAttackWarning, match=r"run in float64, since in torch\.float32 it raised .*not-half"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(net, x, y)) > 0.9999).all()


class Mixed(nn.Module):
    """Keeps some weights in half precision, and casts what they are given to their dtype by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3).bfloat16(), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu().bfloat16())
        logits: Tensor = self.last(x.float().mean((2, 3)))
        return logits


class Particular(nn.Module):
    """Computes something else if its weights are not in the dtype that it was trained in."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net().double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits if logits.dtype == torch.float64 else logits.flip(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [Mixed, Particular])
def test_a_model_that_no_fast_network_equals_runs_on_its_twin(make: type[nn.Module], dtype: torch.dtype) -> None:
    net, (x, y) = make().eval(), batch()
    x = x.double() if make is Particular else x
    truth, fast = input_gradient(net, x, y), FastAttackModel(net, dtype=dtype)
    with pytest.warns(FastAttackWarning, match=r"differs from the wrapped model even if nothing is folded.*twin"):
        found = input_gradient(fast, x, y)
    for _ in range(2):
        assert (cosine(found, truth) > 0.9999).all()
        found = input_gradient(fast, x, y)
    for view in (fast, fast.view(decisions="fast"), fast.view(decisions="exact")):
        torch.testing.assert_close(view(x), net(x).float())
    assert "twin" in fast.summary()


class RunningVariance(nn.Module):
    """Takes the mean of the batch away; one sample alone would make what it keeps NaN."""

    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        with torch.no_grad():
            self.var = 0.9 * self.var + 0.1 * x.var(0)
        centred: Tensor = x - x.mean(0)
        return centred / self.var.sqrt()


class RemembersTheFirst(nn.Module):
    """Compares each sample with all of the first batch that it meets."""

    key: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.key is None:
            self.key = x
        return x @ self.key.mT


class SizedByTheFirst(nn.Module):
    """Keeps as many rows as its first batch has; hands out four anchors, whatever the batch."""

    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.empty(0))
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not len(self.kept):
            self.kept = torch.ones(len(x), 3)
        return self.fc(x) + self.kept[: len(x)], torch.ones(4, 2) * x.mean()


@pytest.mark.parametrize(
    ("model", "samples", "rows", "coupled"),
    [
        (RunningVariance(), 2, (False,), True),
        (RemembersTheFirst(), 4, (False,), True),
        (SizedByTheFirst(), 4, (True, False), False),
        (nn.Linear(3, 3), 4, (True,), False),
        (nn.Linear(3, 3), 1, (True,), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_model_keeps_from_run_to_run_hides_no_coupling(
    model: nn.Module, samples: int, rows: tuple[bool, ...], coupled: bool
) -> None:
    networks = FastAttackModel(model, **FLOAT32)._networks
    x = torch.rand(samples, 3)
    trial = Trial(model, Packed(((x,), {})), [x], [True], networks.precision, in_half=False)
    found, seen = trial.rows(None)
    assert (found.at_outputs, seen) == (rows, coupled)


class FreesWhatItSaved(torch.autograd.Function):
    """Takes one backward pass, and no second one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.saved = [x.detach()]
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.saved.pop().cos()


class TakesOneBackwardPass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Any:
        return self.net(FreesWhatItSaved.apply(x))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_takes_one_backward_pass_is_checked(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, (x, y) = TakesOneBackwardPass().eval(), batch()
    fast = FastAttackModel(model, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(model, x, y)) > 0.9999).all()
    (kind,) = fast._networks.kinds.values()
    assert kind.rows.at_outputs == (False,)
    assert kind.dtype == torch.float32
    assert (dtype == torch.float32) != any("one backward pass only" in note for note in fast._networks.notes)


def test_the_outcome_does_not_hang_on_the_look_at_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that compilers made may refuse to keep its graph even for the first of several backward passes."""
    original: Any = torch.autograd.grad

    def refusing(*args: Any, retain_graph: Any = None, **rest: Any) -> Any:
        if retain_graph:
            raise RuntimeError("expected no retain_graph")
        return original(*args, retain_graph=retain_graph, **rest)

    fast, (x, y) = FastAttackModel(small_net(), **FLOAT32), batch()
    monkeypatch.setattr(torch.autograd, "grad", refusing)
    input_gradient(fast, x, y)
    (kind,) = fast._networks.kinds.values()
    assert kind.rows.at_outputs == (False,)


# --- inputs that are not in the model's dtype -------------------------------------------------------------------------


class BranchesOnData(nn.Module):
    """Does not trace as a whole, and adds the layer's output, which the trace of the stem alone does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem[0](x)
        out: Tensor = self.stem[1](hidden)
        return (out + hidden if bool(x.detach().isfinite().all()) else out).square().mean((2, 3))


DTYPES = [
    (torch.float32, torch.float64, torch.float32),
    (torch.float32, torch.float16, torch.float32),
    (torch.float32, torch.float32, torch.float64),
    (torch.float64, torch.float32, torch.float32),
]


@pytest.mark.parametrize(("own", "given", "asked"), DTYPES, ids=str)
def test_inputs_in_another_dtype_than_the_models_are_checked(
    own: torch.dtype, given: torch.dtype, asked: torch.dtype
) -> None:
    net, (x, y) = BranchesOnData().eval(), batch()
    net.stem[1].running_var.fill_(0.1)  # type: ignore[operator]
    wanted, truth = net(x), input_gradient(net, x, y % 4)
    fast = FastAttackModel(net.to(own), dtype=asked)
    with pytest.warns(FastAttackWarning, match="folded into 0 layers only"):
        found = input_gradient(fast, x.to(given), y % 4)
    assert (cosine(found, truth) > 0.9999).all()
    torch.testing.assert_close(fast.view(decisions="fast")(x.to(given)), wanted, rtol=1e-3, atol=1e-3)


def test_samples_that_see_each_other_are_noticed_in_another_dtype_too() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3))
    with pytest.warns(FastAttackWarning, match="one loss scale serves the whole call"):
        input_gradient(FastAttackModel(net, **FLOAT32), torch.rand(4, 4).double(), torch.tensor([0, 1, 2, 0]))


class CastsToFloat32(nn.Module):
    """What cannot be made wider."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.norm(self.conv(x)).relu().mean((2, 3)).float())
        return logits


def test_what_cannot_be_checked_runs_on_the_twin_and_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = CastsToFloat32().eval(), batch()
    fast, truth = FastAttackModel(net, dtype=torch.float64), input_gradient(net, x, y)
    with pytest.warns(FastAttackWarning, match=r"compared with nothing, since .* same dtype.*twin.*#not-folded"):
        assert torch.allclose(input_gradient(fast, x, y), truth, atol=1e-6)
    monkeypatch.setattr(networks, "check", None)
    assert torch.allclose(input_gradient(fast, x, y), truth, atol=1e-6)
    (kind,) = fast._networks.kinds.values()
    assert kind.full
    assert not kind.apart, "whether samples see each other is not known either"
