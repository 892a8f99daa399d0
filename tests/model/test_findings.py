"""Faults that reviewers found once, each kept as a test of what must not come back."""

import copy
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning, SafePGD
from fastadv_adapters.boundary.scaling import START
from fastadv_adapters.networks.freshness import Change
from fastadv_adapters.torchattacks import accelerate
from tests.support.tools import batch, cosine, head_of, input_gradient, reference, settle, small_net

FLOAT32: Any = {"dtype": torch.float32}


class Optional(nn.Module):
    """Traces as if the optional input were always given; without it, the layer is read without its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6), nn.Conv1d(6, 3, 1)
        settle(self)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        h = self.layer(x[:, :, None])
        out: Tensor = self.head(h) if extra is None else self.head(self.norm(h)) + extra[:, :, None]
        return out


def test_another_branch_in_a_later_call_is_noticed() -> None:
    net = Optional().eval()
    fast, x = FastAttackModel(net, **FLOAT32), torch.rand(4, 4, requires_grad=True)
    extra = torch.rand(4, 3)
    torch.testing.assert_close(fast(x, extra), net(x, extra))
    with pytest.warns(FastAttackWarning, match="not folded into|folded into 0 layers only"):
        found = fast(x)
    torch.testing.assert_close(found, net(x))
    torch.testing.assert_close(fast(x, extra), net(x, extra))


def steep() -> nn.Sequential:
    """Overflows in float16 until the scale has been lowered."""
    net = small_net()
    with torch.no_grad():
        head_of(net).weight.mul_(5e4 / head_of(net).weight.abs().max())
    return net


def weighted(weights: list[float]) -> Any:
    return lambda logits, y: (logits * torch.linspace(-1, 1, 10) * torch.tensor(weights)[:, None]).sum()


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


class Pair(nn.Module):
    """Two inputs that a caller may make depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.left(a).tanh() * self.right(b).sigmoid()
        return out


@pytest.mark.parametrize("create_graph", [False, True])
def test_inputs_that_depend_on_each_other(create_graph: bool) -> None:
    net, x = Pair(), torch.rand(3, 4, requires_grad=True)
    fast = FastAttackModel(net, **FLOAT32)
    for other in (x, 2 * x):
        (found,) = torch.autograd.grad(fast(x, other).sum(), x, create_graph=create_graph, retain_graph=True)
        (expected,) = torch.autograd.grad(net(x, other).sum(), x, create_graph=create_graph, retain_graph=True)
        torch.testing.assert_close(found, expected)


def test_the_first_gradient_through_a_full_precision_view_is_checked() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3))
    x, y = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = lambda logits, y: (F.cross_entropy(logits, y, reduction="none") * 10.0 ** torch.arange(6)).sum()  # noqa: E731
    with pytest.warns(FastAttackWarning, match="one loss scale serves the whole call"):
        found = input_gradient(FastAttackModel(net, **FLOAT32).view(full_precision=True), x, y, loss)
    assert (cosine(found, input_gradient(reference(net), x.double(), y, loss)) > 0.999).all()


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


class WithBuffer(nn.Module):
    """Reads a buffer that others exchange by ``.data``."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("scale", torch.ones(1000))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) * self.scale.mean()
        return out


def test_storage_that_comes_back_at_the_same_address_is_noticed() -> None:
    net = WithBuffer()
    fast, x = FastAttackModel(net, **FLOAT32), torch.rand(2, 4, requires_grad=True)
    for _ in range(5):
        for _ in range(2):
            net.scale.data = net.scale.data * 0.9
        torch.testing.assert_close(fast(x), net(x))


def test_a_weight_turned_around_is_followed() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    fast, x = FastAttackModel(net, **FLOAT32), torch.rand(2, 4, requires_grad=True)
    fast(x)
    weight: Tensor = net[0].weight  # type: ignore[assignment]
    weight.data = weight.data.t()
    torch.testing.assert_close(fast(x), net(x))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))


@pytest.mark.parametrize("auto_update", [True, False])
@pytest.mark.parametrize("structural", [True, False])
def test_an_interrupted_update_is_never_used(
    auto_update: bool, structural: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32, auto_update=auto_update)
    input_gradient(fast, x, y)
    for parameter in net.parameters():
        parameter.data.mul_(1.5)
    if structural:
        vars(net)["flag"] = True

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastadv_adapters.networks.pair.build_fast", interrupt)
        patch.setattr(fast._networks.folded.refreshes[2].__class__, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fast.update()
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference(net), x.double(), y)) > 0.9999).all()


def test_without_auto_update_exact_values_are_of_one_model() -> None:
    net, (x, _) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32, auto_update=False)
    with torch.no_grad():
        before = fast(x).clone()
        head_of(net).weight.mul_(2)
        net.train()(torch.rand(8, 3, 8, 8) * 3)
        assert torch.equal(fast(x), before)
        torch.testing.assert_close(fast.update()(x), copy.deepcopy(net).eval()(x))


def test_a_float16_input_gets_a_finite_gradient() -> None:
    net, (x, y) = small_net().half(), batch(3)
    fast = FastAttackModel(net, **FLOAT32)
    huge = lambda logits, y: F.cross_entropy(logits.float(), y) * 1e8  # noqa: E731
    found = input_gradient(fast, x.half(), y, huge)
    assert found.dtype == torch.float16
    assert found.isfinite().all()
    assert (cosine(found, input_gradient(reference(net), x.half().double(), y)) > 0.99).all()


class Box:
    """A class that PyTorch does not look into."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Boxed(nn.Module):
    """Hides its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Box:
        return Box(self.layer(x))


@pytest.mark.parametrize("with_gradient", [True, False])
def test_an_output_in_which_no_tensor_is_seen_is_an_error(with_gradient: bool) -> None:
    x = torch.rand(2, 4, requires_grad=with_gradient)
    with pytest.raises(TypeError, match=r"expected an output of tensors, .* register the class"):
        FastAttackModel(Boxed(), **FLOAT32)(x)


class Scaled(nn.Module):
    """Takes a 0-d tensor, stores an activation, and forgets it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.seen: Tensor | None = torch.zeros(1)

    def forward(self, x: Tensor, temperature: Tensor) -> Tensor:
        out: Tensor = self.layer(x) / temperature
        self.seen = out if self.seen is None else None
        return out


def test_scalar_inputs_and_stored_activations() -> None:
    net, x = Scaled(), torch.rand(3, 4, requires_grad=True)
    fast = FastAttackModel(net, **FLOAT32)
    for step in range(4):
        temperature = torch.tensor(1.0 + step, requires_grad=True)
        (found,) = torch.autograd.grad(fast(x, temperature).sum(), x)
        torch.testing.assert_close(found, net.layer.weight.detach().sum(0).expand(3, 4) / (1.0 + step))
        with torch.inference_mode():
            fast.view(decisions="fast")(x, temperature)
        with torch.no_grad():
            net.layer.weight.mul_(1.1)


def test_a_refused_acceleration_leaves_every_part_as_it_was() -> None:
    net = small_net().eval()
    good, bad = torchattacks.PGD(net), torchattacks.FGSM(net)
    both = torchattacks.MultiAttack([good, bad])
    bad._model_training = True
    with pytest.raises(RuntimeError, match="FGSM set to training mode"):
        accelerate(both)
    assert both.model is good.model is bad.model is net


def test_autocast_around_the_call_changes_nothing_backwards_either() -> None:
    net, (x, y) = small_net(), batch()
    for fast in (FastAttackModel(net, **FLOAT32), FastAttackModel(net, dtype=torch.bfloat16).view(full_precision=True)):
        expected = input_gradient(fast, x, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            leaf = x.clone().requires_grad_()
            (found,) = torch.autograd.grad(F.cross_entropy(fast(leaf).float(), y), leaf)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_made_under_inference_mode() -> None:
    net, (x, y) = small_net(), batch()
    with torch.inference_mode():
        fast, attack = FastAttackModel(net, **FLOAT32), SafePGD(net, eps=0.1, steps=2)
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference(net), x.double(), y)) > 0.9999).all()
    fast.update()
    assert attack(x, y).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_inputs_in_another_dtype_than_the_models_with_and_without_gradient(dtype: torch.dtype) -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    with torch.no_grad():
        assert torch.equal(fast(x.to(dtype)), fast(x.to(dtype).float()))
    assert input_gradient(fast, x.to(dtype), y).dtype == dtype
    assert SafePGD(fast, eps=0.1, steps=2)(x.to(dtype), y).dtype == dtype


@pytest.mark.parametrize("option", [{"fuse_bn": "no"}, {"auto_update": 1}, {"channels_last": 1}])
def test_flags_are_true_or_false(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="True"):
        FastAttackModel(small_net(), **option)


def test_a_rebuild_asks_for_the_options_again() -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, dtype=torch.bfloat16)
    fast._networks.precision = fast._networks.precision.__class__(torch.device("cpu"), torch.float32, False)
    vars(net)["flag"] = 1
    assert fast._networks._freshness.change() is Change.STRUCTURE
    input_gradient(fast, x, y)
    assert fast.dtype == torch.bfloat16
    assert fast._networks.precision.channels_last


class Viewing(nn.Module):
    """Flattens as many people do: by ``view`` and ``len``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 10)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.norm(self.conv(x))).view(len(x), -1))
        return out


def test_len_in_a_forward_folds_and_the_warning_points_at_the_callers_line() -> None:
    fast, (x, y) = FastAttackModel(Viewing(), **FLOAT32), batch()
    assert "norm  folded into conv" in fast.summary()
    with pytest.warns(FastAttackWarning, match="contiguous layout") as caught:
        torchattacks.FGSM(fast)(x, y)
    assert caught[0].filename == __file__
