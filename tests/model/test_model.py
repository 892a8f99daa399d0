"""``FastAttackModel`` as an object: what it refuses, what it leaves alone, how it lives with other modules."""

import copy
import pickle
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning, SafePGD
from fastadv_adapters.modules import device_of
from tests.support.tools import batch, cosine, fingerprint, head_of, input_gradient, reference, small_net

FLOAT32: Any = {"dtype": torch.float32}


def with_nan() -> nn.Module:
    net = small_net()
    head_of(net).bias.data[3] = float("nan")
    return net


PATCHED = small_net()


def patched() -> nn.Module:
    vars(PATCHED)["forward"] = lambda x: type(PATCHED).forward(PATCHED, x) / 2
    return PATCHED


def hooked_to_itself() -> nn.Module:
    net = small_net()
    net[0].register_forward_hook(lambda module, inputs, output: setattr(net, "seen", output))
    return net


def with_iterator() -> nn.Module:
    net = small_net()
    vars(net)["rows"] = iter(net.children())
    return net


def on_two_devices() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: F.relu, TypeError, r"expected a torch.nn.Module, got .*function.*wrap the model itself"),
        (lambda: nn.Flatten(), ValueError, "expected a model with parameters, got Flatten without any"),
        (lambda: nn.LazyLinear(3), ValueError, "expected initialised parameters, got .* lazy: run the model once"),
        (lambda: nn.Linear(2, 2, device="meta"), ValueError, "on the meta device: load the weights first"),
        (on_two_devices, ValueError, "on the meta device"),
        (with_nan, ValueError, "expected weights without NaN, got NaN in 7.bias: load a checkpoint"),
        (patched, ValueError, "forward to be a method of the class, got one patched on the instance of Sequential"),
        (hooked_to_itself, ValueError, "captures a part of the model itself.*Remove the hook before wrapping"),
        (with_iterator, ValueError, "expected a model that can be copied.*Remove what cannot be copied"),
        (lambda: FastAttackModel(small_net()), ValueError, "with a FastAttackModel in it: wrap the whole plain model"),
        (lambda: nn.Sequential(FastAttackModel(small_net())), ValueError, "got Sequential with a FastAttackModel"),
    ],
)
def test_models_that_cannot_be_wrapped(make: Any, error: type[Exception], text: str) -> None:
    model = make()
    real = isinstance(model, nn.Module) and not any(
        p.is_meta or isinstance(p, nn.UninitializedParameter) for p in model.parameters()
    )
    before = fingerprint(model) if real else []
    with pytest.raises(error, match=text):
        FastAttackModel(model)
    assert (fingerprint(model) if real else []) == before


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_a_quantised_model_is_refused() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.table = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
            self.register_buffer("codes", self.table)

    with pytest.raises(ValueError, match="expected a floating-point model, got quantised codes"):
        FastAttackModel(Quantised())


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"dtype": torch.int8}, r'expected dtype to be "auto" or one of .*, got torch.int8'),
        ({"dtype": "half"}, "expected dtype to be .* got 'half'"),
        ({"channels_last": "yes"}, "expected channels_last to be True, False or"),
        ({"loss_scale": "big"}, "expected loss_scale to be .* got 'big'"),
        ({"loss_scale": -1.0}, "positive number or None, got -1.0"),
        ({"decisions": "slow"}, "expected decisions to be one of 'auto', 'exact', 'fast', got 'slow'"),
        ({"logits_dtype": torch.float16}, "expected logits_dtype to be .* got torch.float16"),
    ],
)
def test_unknown_option_values(option: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FastAttackModel(small_net(), **option)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused() -> None:
    scripted = torch.jit.script(small_net())
    with pytest.raises(ValueError, match=r"expected a model in Python, got .* with TorchScript in it"):
        FastAttackModel(scripted)


def test_a_model_on_two_devices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on one device, got cpu, meta. Move the model with .to\(\)"):
        device_of(on_two_devices())
    with pytest.raises(ValueError, match="got none at all"):
        device_of(nn.Flatten())


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'fuse'"):
        FastAttackModel(small_net(), fuse=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), TypeError, "floating-point tensor, got torch.int64: convert it"),
        (3.0, TypeError, "expected an input that is a floating-point tensor, got no tensor"),
        (torch.tensor(1.0), ValueError, "expected an input with a batch dimension, got a 0-d tensor"),
        (torch.zeros(2, 3, 8, 8, device="meta"), ValueError, "on the model's device cpu, got one on meta: move it"),
        (
            torch.zeros(2, 5, 8, 8),
            RuntimeError,
            r"Sequential refused an input of shape \(2, 5, 8, 8\) torch.float32: .*",
        ),
    ],
)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_inputs_that_cannot_be_attacked(x: Any, error: type[Exception], text: str, with_gradient: bool) -> None:
    net = small_net()
    fast, before = FastAttackModel(net, **FLOAT32), fingerprint(net)
    if with_gradient and isinstance(x, Tensor) and x.is_floating_point():
        x = x.clone().requires_grad_()
    with pytest.raises(error, match=text):
        fast(x)
    assert fingerprint(net) == before
    images, labels = batch()
    assert input_gradient(fast, images, labels).isfinite().all(), "the model is usable after the error"


@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_eval_mode_function_and_leaves_no_trace(training: bool) -> None:
    net, (x, y) = small_net(), batch()
    net.insert(7, nn.Dropout(0.5))
    net.train(training)
    net[0].eval()
    before = fingerprint(net)
    fast = FastAttackModel(net, **FLOAT32)
    found = input_gradient(fast, x, y)
    F.cross_entropy(fast(x.requires_grad_()), y).backward()
    fast.update()
    assert fingerprint(net) == before
    assert (cosine(found, input_gradient(reference(net), x.double(), y)) > 0.9999).all()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), copy.deepcopy(net).eval()(x))


def test_modes_do_not_change() -> None:
    fast = FastAttackModel(small_net(), **FLOAT32)
    parent = nn.Sequential(fast, nn.BatchNorm1d(10))
    assert fast.train() is fast
    parent.train()
    assert not fast.training
    assert parent[1].training
    assert fast.eval() is fast


def test_a_parent_sees_nothing_to_train_or_save() -> None:
    fast = FastAttackModel(small_net(), **FLOAT32)
    parent = nn.Sequential(nn.Linear(3, 3), fast)
    assert set(parent.state_dict()) == {"0.weight", "0.bias"}
    parent.load_state_dict(parent.state_dict())
    assert [p.shape for p in parent.parameters() if p.requires_grad] == [(3, 3), (3,)]
    assert next(fast.parameters()).device == torch.device("cpu")
    assert fast.to("meta") is fast
    assert fast.half() is fast
    assert fast.device == torch.device("cpu")


def test_copies_and_pickles_have_their_own_model() -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32, decisions="exact", logits_dtype=torch.float64)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.wrapped is not net
        assert torch.equal(input_gradient(other, x, y), input_gradient(fast, x, y))
        assert other(x).dtype == torch.float64
        with torch.no_grad():
            next(reversed(list(other.wrapped.parameters()))).add_(torch.linspace(0, 9, 10))
            assert not torch.equal(other(x), fast(x))


def test_views_share_networks_and_statistics() -> None:
    fast, (x, y) = FastAttackModel(small_net(), **FLOAT32), batch()
    view = fast.view(logits_dtype=torch.float64)
    assert view(x).dtype == torch.float64
    assert fast(x).dtype == torch.float32
    input_gradient(view, x, y)
    assert fast.gradient_stats.passes == 1


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"decisions": "none"}, "expected decisions"),
        ({"decisions": ""}, "expected decisions"),
        ({"logits_dtype": ""}, "expected logits_dtype"),
        ({"full_precision": "no"}, "expected full_precision to be True or False, got 'no'"),
    ],
)
def test_a_view_takes_no_value_that_does_not_exist(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FastAttackModel(small_net()).view(**asked)


def test_an_outer_autocast_changes_nothing() -> None:
    net, (x, _) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        inside, inside_fast = fast(x), fast.view(decisions="fast")(x)
    with torch.no_grad():
        assert torch.equal(inside, fast(x))
        assert torch.equal(inside_fast, fast.view(decisions="fast")(x))


def test_inference_mode_first_then_gradients() -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    with torch.inference_mode():
        fast.view(decisions="fast")(x)
        with torch.no_grad():
            head_of(net).bias.add_(1)
        fast(x)
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference(net), x.double(), y)) > 0.9999).all()


@pytest.mark.parametrize("samples", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_batches(samples: int, dtype: torch.dtype) -> None:
    fast, x = FastAttackModel(small_net(), dtype=dtype), batch(samples)[0]
    x.requires_grad_()
    logits = fast(x)
    assert logits.shape == (samples, 10)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.shape == x.shape
    assert fast.gradient_stats.samples == samples


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_other_dtypes(dtype: torch.dtype) -> None:
    net, (x, y) = small_net().to(dtype), batch(3)
    fast = FastAttackModel(net, **FLOAT32)
    found = input_gradient(fast, x.to(dtype), y)
    assert found.dtype == dtype
    assert (cosine(found, input_gradient(reference(net), x.to(dtype).double(), y)) > 0.99).all()


def test_non_contiguous_inputs_give_contiguous_gradients() -> None:
    fast, (x, y) = FastAttackModel(small_net(), **FLOAT32), batch()
    expected = input_gradient(fast, x, y)
    strided = torch.empty(*x.shape, 2)[..., 0].copy_(x)
    for other in (x.contiguous(memory_format=torch.channels_last), strided):
        leaf = other.detach().requires_grad_()
        assert not leaf.is_contiguous()
        (gradient,) = torch.autograd.grad(F.cross_entropy(fast(leaf), y), leaf)
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient, expected)


class HalfRefuser(nn.Module):
    """Raises in half precision, as operators without a half kernel do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if x.dtype != torch.float32:
            raise RuntimeError("not implemented for 'Half'")
        return x


def test_kinds_that_are_met_later_run_in_the_wider_dtype() -> None:
    fast, x = FastAttackModel(HalfRefuser(), dtype=torch.bfloat16), torch.rand(3, 4, requires_grad=True)
    with pytest.warns(FastAttackWarning, match="and new ones, run in float32"):
        fast(x)
    fast(x[None])  # a warning would be an error
    assert [kind.dtype for kind in fast._networks.kinds.values()] == [torch.float32] * 2


def test_what_raises_only_in_half_precision_runs_in_float32_with_one_warning() -> None:
    fast, x = FastAttackModel(HalfRefuser(), dtype=torch.bfloat16), torch.rand(3, 4, requires_grad=True)
    with pytest.warns(FastAttackWarning, match="run in float32, since in torch.bfloat16 it raised .*not-half"):
        fast(x)
    assert fast(x).sum().isfinite()
    assert "not implemented for 'Half'" in fast.summary()


class Viewing(nn.Module):
    """Views its feature maps, which channels-last ones do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        out: Tensor = self.head(x.view(x.shape[0], -1))
        return out


def test_a_model_that_views_runs_in_the_contiguous_layout_with_one_warning() -> None:
    net, (x, y) = Viewing(), batch()
    fast = FastAttackModel(net, dtype=torch.bfloat16)
    with pytest.warns(FastAttackWarning, match="contiguous layout, since channels-last it raised .*not-channels-last"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(reference(net), x.double(), y)) > 0.98).all()
    assert torch.equal(input_gradient(fast, x, y), found)


def test_random_models_are_left_random_and_the_generators_where_they_were() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x + 0.1 * torch.randn_like(x))
            return out

    net, (x, y) = Noisy().eval(), batch()
    fast = FastAttackModel(net, **FLOAT32, channels_last=False)  # random numbers are drawn in memory order
    torch.manual_seed(5)
    found = input_gradient(fast, x, y)
    torch.manual_seed(5)
    assert (cosine(found, input_gradient(net, x, y)) > 0.9999).all()
    assert not torch.equal(input_gradient(fast, x, y), found)


def test_summary_tells_what_was_done() -> None:
    fast = FastAttackModel(small_net(), dtype=torch.bfloat16)
    text = fast.summary()
    for part in (
        "Sequential",
        "bfloat16",
        "channels-last",
        "5 folded",
        "folded into layer 0\n",
        "minimum-norm attacks",
    ):
        assert part in text
    assert "due at the first gradient pass" in text
    input_gradient(fast, *batch())
    assert "done at the first gradient pass" in fast.summary()
    assert "fuse_bn=False" in FastAttackModel(small_net(), fuse_bn=False).summary()
    assert "none in this model" in FastAttackModel(nn.Linear(2, 2)).summary()


def test_wrappers_are_taken_off() -> None:
    net = small_net()
    compiled = torch.compile(net, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert FastAttackModel(compiled).wrapped is net
    with pytest.warns(FastAttackWarning, match="runs the module inside nn.DataParallel on one device"):
        assert FastAttackModel(nn.DataParallel(net)).wrapped is net


def test_hooks_that_use_what_they_are_handed_run_on_the_copy() -> None:
    net, (x, y) = small_net(), batch()
    net[0].register_forward_hook(lambda module, inputs, output: output * 2)
    bound = types.MethodType(lambda self, module, inputs: (inputs[0] / self.in_features,), net[7])
    net[7].register_forward_pre_hook(bound)
    fast = FastAttackModel(net, **FLOAT32)
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference(net), x.double(), y)) > 0.9999).all()


def test_two_fast_models_of_one_model() -> None:
    net, (x, y) = small_net(), batch()
    first, second = FastAttackModel(net, **FLOAT32), FastAttackModel(net, **FLOAT32, fuse_bn=False)
    with torch.no_grad():
        head_of(net).weight.mul_(2)
    torch.testing.assert_close(input_gradient(first, x, y), input_gradient(second, x, y), rtol=1e-3, atol=1e-6)


def test_a_parent_finds_nothing_to_train_and_moves_all_its_parameters() -> None:
    fast = FastAttackModel(small_net(), **FLOAT32)
    parent = nn.Sequential(nn.Linear(2, 2), fast)
    parent.requires_grad_(True)
    assert [name for name, p in parent.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]
    parent.to("meta")
    assert {p.device.type for p in parent.parameters()} == {"meta"}
    assert {p.device.type for p in fast.parameters()} == {"cpu"}


def test_a_view_of_a_view_in_full_precision_stays_in_full_precision() -> None:
    net, (x, y) = small_net(), batch()
    view = FastAttackModel(net, dtype=torch.bfloat16).view(full_precision=True).view(logits_dtype=torch.float64)
    assert (cosine(input_gradient(view, x, y), input_gradient(reference(net), x.double(), y)) > 0.99999).all()
    assert "this view in full precision" in view.summary()
    assert "this view" not in view.view(full_precision=False).summary()


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


@pytest.mark.parametrize("option", [{"fuse_bn": "no"}, {"auto_update": 1}, {"channels_last": 1}])
def test_flags_are_true_or_false(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="True"):
        FastAttackModel(small_net(), **option)
