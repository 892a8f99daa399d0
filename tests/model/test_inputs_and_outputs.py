"""What models take and what they give: several inputs, integers, data classes, odd batches, layouts and dtypes."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning, SafePGD
from tests.support.agreement import agrees, weighed
from tests.support.tools import batch, cosine, fingerprint, input_gradient, reference, settle, small_net

FLOAT32: Any = {"dtype": torch.float32}


# --- several inputs ---------------------------------------------------------------------------------------------------


class Conditioned(nn.Module):
    """Images with the class that they are of, a mask, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.classes = small_net(), nn.Embedding(7, 10)

    def forward(self, x: Tensor, which: Tensor, *, mask: Tensor, steps: int = 1) -> Tensor:
        out: Tensor = self.net(x) * steps + self.classes(which) * mask
        return out


def test_integer_and_boolean_inputs_after_the_first() -> None:
    net, (x, _) = Conditioned().eval(), batch(5)
    which, mask = torch.tensor([0, 6, 3, 3, 1]), torch.rand(5, 10) > 0.5
    fast, before = FastAttackModel(net, **FLOAT32), fingerprint(net)
    for steps in (1, 2):
        torch.testing.assert_close(fast(x, which, mask=mask, steps=steps), net(x, which, mask=mask, steps=steps))
    leaf = x.clone().requires_grad_()
    for model in (fast, fast.view(decisions="exact"), fast.view(full_precision=True)):
        (found,) = torch.autograd.grad(weighed(model(leaf, which, mask=mask, steps=2)), leaf)
        (expected,) = torch.autograd.grad(weighed(net(leaf, which, mask=mask, steps=2)), leaf)
        assert (cosine(found, expected) > 0.9999).all()
    assert fingerprint(net) == before


class Fills(Conditioned):
    """Puts a loss of its own into a container of the caller's."""

    def forward(self, x: Tensor, into: Any, *, more: Any = None) -> Tensor:  # type: ignore[override]
        out: Tensor = self.net(x)
        if isinstance(into, dict):
            into["more"] = out.square().mean()
        elif isinstance(into, list):
            into.append(out.square().mean())
        return out


@pytest.mark.parametrize("make", [dict, list])
def test_an_empty_container_that_the_model_fills_is_an_error(make: Callable[[], Any]) -> None:
    fast, (x, _) = FastAttackModel(Fills().eval(), **FLOAT32), batch(5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(TypeError, match="fills a list or dictionary"):
            fast(x.clone().requires_grad_(grad), make())
    torch.testing.assert_close(fast(x, None, more={}), fast.wrapped(x, None))
    torch.testing.assert_close(fast(x, {"x": x}), fast.wrapped(x, {}))


def test_a_cache_of_transformers_is_left_out_where_gradients_are_wanted() -> None:
    """As with ``use_cache=False``: decoders hand one out by default."""
    base = type("Cache", (), {"__module__": "transformers.cache_utils"})

    class DynamicCache(base):  # type: ignore[misc, valid-type]
        def __init__(self, keys: Tensor) -> None:
            self.keys = keys

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> dict[str, Any]:
            out = self.net(x)
            return {"logits": out.sin(), "past_key_values": DynamicCache(out)}

    net, (x, _) = Decoder().eval(), batch(5)
    fast, leaf = FastAttackModel(net, **FLOAT32), x.clone().requires_grad_()
    output = fast(leaf)
    assert output["past_key_values"] is None
    found, wanted = (torch.autograd.grad(weighed(o["logits"]), leaf)[0] for o in (output, net(leaf)))
    assert (cosine(found, wanted) > 0.9999).all()
    with torch.no_grad():
        assert isinstance(fast(x)["past_key_values"], DynamicCache)


def test_only_the_inputs_that_want_a_gradient_get_one() -> None:
    net = nn.Bilinear(4, 3, 5)
    a, b = torch.rand(2, 4), torch.rand(2, 3, requires_grad=True)
    fast = FastAttackModel(net, **FLOAT32)
    torch.testing.assert_close(torch.autograd.grad(weighed(fast(a, b)), b), torch.autograd.grad(weighed(net(a, b)), b))
    assert a.grad is None


# --- outputs ----------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "logits features")


@dataclass
class Output:
    """As model libraries write them: some fields unused, one computed from another."""

    logits: Tensor
    hidden: Any = None
    loss: Tensor | None = None
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.probabilities = self.logits.softmax(-1)


@dataclass(frozen=True)
class Frozen:
    """Cannot be written to."""

    values: Tensor


class Giving(nn.Module):
    """Gives its logits in whatever ``form`` makes of them."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.net = small_net()
        vars(self)["form"] = form

    def forward(self, x: Any) -> Any:
        form: Any = self.form
        return form(self.net(x.values if isinstance(x, Frozen) else x))


def test_data_classes_as_outputs() -> None:
    def form(logits: Tensor) -> tuple[Output, int]:
        return Output(logits, hidden=[Frozen(logits.tanh()), {"more": logits * 2}], names=["a"]), 3

    net, (x, _) = Giving(form).eval(), batch(3)
    fast, x = FastAttackModel(net, dtype=torch.float32, logits_dtype=torch.float64), x.requires_grad_()
    (ours, number), (theirs, _) = fast(x), net(x)
    assert (number, ours.names, ours.loss) == (3, ["a"], None)
    assert type(ours) is Output
    assert isinstance(ours.hidden[0], Frozen)
    picks: list[Any] = [
        lambda out: out.logits,
        lambda out: out.probabilities,
        lambda out: out.hidden[0].values + out.hidden[1]["more"],
    ]
    for pick in picks:
        assert pick(ours).dtype == torch.float64
        torch.testing.assert_close(pick(ours), pick(theirs).double(), rtol=1e-4, atol=1e-5)
        (found,) = torch.autograd.grad(weighed(pick(ours)), x, retain_graph=True)
        (expected,) = torch.autograd.grad(weighed(pick(theirs)), x, retain_graph=True)
        assert (cosine(found, expected) > 0.9999).all()


def test_data_classes_as_inputs() -> None:
    net, (x, _) = Giving(lambda logits: logits).eval(), batch(3)
    fast, leaf = FastAttackModel(net, **FLOAT32), x.requires_grad_()
    given = Frozen(leaf)
    (found,) = torch.autograd.grad(weighed(fast(given)), leaf)
    assert (cosine(found, torch.autograd.grad(weighed(net(given)), leaf)[0]) > 0.9999).all()
    assert given.values is leaf


def test_named_tuples_and_lists_as_outputs() -> None:
    net, (x, _) = Giving(lambda logits: [Pair(logits, (logits.exp(),))]).eval(), batch(3)
    fast, x = FastAttackModel(net, **FLOAT32), x.requires_grad_()
    (ours,), (theirs,) = fast(x), net(x)
    assert isinstance(ours, Pair)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    (found,) = torch.autograd.grad(weighed(ours.features[0]), x)
    assert (cosine(found, torch.autograd.grad(weighed(theirs.features[0]), x)[0]) > 0.9999).all()


class Box:
    """A class that PyTorch does not look into."""

    def __init__(self, held: Tensor) -> None:
        self.held = held


@pytest.mark.parametrize("form", [lambda logits: (logits, Box(logits)), lambda logits: (logits, {logits})])
def test_a_tensor_hidden_beside_others_is_an_error_where_its_gradient_would_be_lost(form: Any) -> None:
    net, (x, _) = Giving(form), batch(3)
    fast = FastAttackModel(net, **FLOAT32)
    with pytest.raises(TypeError, match=r"expected an output of tensors, .* got tensors inside a (Box|set): return"):
        fast(x.clone().requires_grad_())
    with torch.no_grad():
        fast(x)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_changing_size(dtype: torch.dtype) -> None:
    """A whole epoch with a smaller last batch, one sample, and none."""
    net = small_net().eval()
    fast = FastAttackModel(net, dtype=dtype)
    close = {torch.float32: 0.9999, torch.bfloat16: 0.5}[dtype]  # in so small a network one ReLU that flips is visible
    for samples in (8, 8, 3, 1, 0, 8):
        part, labels = batch(samples, seed=samples)
        found = input_gradient(fast, part, labels)
        expected = input_gradient(net, part, labels)
        assert (cosine(found, expected) > close).all()
        assert SafePGD(fast, eps=0.03, steps=1)(part, labels).shape == part.shape
    assert fast.gradient_stats.nonfinite == 0


class FixedBatch(nn.Module):
    """Takes batches of six only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.conv(x).view(6, -1))
        return out


def test_a_model_for_one_batch_size_is_checked_on_the_whole_batch() -> None:
    net, (x, y) = FixedBatch(), batch(6)
    fast = FastAttackModel(net, **FLOAT32)
    with pytest.warns(FastAttackWarning, match="contiguous layout, since channels-last it raised"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(net, x, y)) > 0.9999).all()


def test_an_input_that_the_model_refuses_does_not_count_as_checked() -> None:
    net, (x, y) = FixedBatch(), batch(6)
    fast = FastAttackModel(net, **FLOAT32)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="refused an input of shape"):
            input_gradient(fast, x[:5], y[:5])
    assert "due at the first gradient pass" in fast.summary()
    with pytest.warns(FastAttackWarning, match="contiguous layout"):
        input_gradient(fast, x, y)


# --- layouts and dtypes -----------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Any] = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second pixel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "cut out of a larger image": lambda x: F.pad(x, (1, 2, 3, 4))[..., 3:-4, 1:-2],
    "one image for all": lambda x: x[:1].expand(4, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("channels_last", [True, False])
def test_inputs_in_any_layout_get_contiguous_gradients(layout: Any, channels_last: bool) -> None:
    net, (x, y) = small_net().eval(), batch(4)
    fast = FastAttackModel(net, **FLOAT32, channels_last=channels_last)
    given = layout(x)
    assert not given.is_contiguous()
    leaf = given.detach().requires_grad_()
    (found,) = torch.autograd.grad(F.cross_entropy(fast(leaf), y), leaf)
    assert found.is_contiguous()
    assert (cosine(found, input_gradient(net, given.contiguous(), y)) > 0.9999).all()
    with torch.no_grad():
        torch.testing.assert_close(fast(given), net(given))


@pytest.mark.parametrize("dtype", ["auto", torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float64, torch.float32])
def test_a_float64_model(dtype: Any, given: torch.dtype) -> None:
    net, (x, y) = small_net().double().eval(), batch(4)
    fast = FastAttackModel(net, dtype=dtype, logits_dtype=torch.float64)
    expected = input_gradient(net, x.to(given).double(), y)
    found = input_gradient(fast, x.to(given), y)
    assert found.dtype == given
    assert (cosine(found, expected) > {torch.float64: 1 - 1e-6, torch.float32: 0.9999}.get(dtype, 0.95)).all()
    with torch.no_grad():
        assert torch.equal(fast(x.to(given)), net(x.to(given).double())), "the exact path is in the model's own dtype"


def test_a_float64_model_is_attacked_in_float64() -> None:
    net, (x, y) = small_net().double().eval(), batch(4)
    adversarial = SafePGD(net, eps=0.03, steps=2)(x.double(), y)
    assert adversarial.dtype == torch.float64
    losses = [F.cross_entropy(net(images), y) for images in (x.double(), adversarial)]
    assert losses[1] > losses[0]


class Queries(nn.Module):
    """As detectors give them: (queries, N, classes), the batch in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(36, 5)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.norm(self.conv(x)).relu().flatten(2)
        out: Tensor = self.head(maps).transpose(0, 1)
        return out


@pytest.mark.parametrize("samples", [3, 6])
def test_outputs_with_the_batch_in_the_middle(samples: int) -> None:
    net, x = Queries().eval(), batch(samples)[0]
    loss = lambda out, _: (out * 10.0 ** torch.arange(6)[:, None, None]).sum()  # noqa: E731
    found = input_gradient(FastAttackModel(net, **FLOAT32), x, x, loss)
    assert (cosine(found, input_gradient(reference(net), x.double(), x, loss)) > 0.9999).all()
    agrees(FastAttackModel(net, **FLOAT32), net, x)


# --- outputs that hide tensors ----------------------------------------------------------------------------------------


class Slots:
    """Holds a tensor where no ``__dict__`` shows it."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Held:
    """An object of a class that nobody knows."""

    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)


HIDING: dict[str, Callable[[Tensor], object]] = {
    "slots": Slots,
    "a list in an object": lambda t: Held(inner=[t]),
    "a dict in an object": lambda t: Held(inner={"t": Held(t=t)}),
}


@pytest.mark.parametrize("name", HIDING)
def test_tensors_that_hide_deep_in_an_output_are_refused(name: str) -> None:
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> tuple[Tensor, object]:
            logits: Tensor = self.net(x)
            return logits, HIDING[name](logits)

    with pytest.raises(TypeError, match="expected an output of tensors"):
        FastAttackModel(Hides(), **FLOAT32)(batch()[0].requires_grad_())


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


# --- inputs that depend on each other, numbers, other dtypes ----------------------------------------------------------


class TwoSides(nn.Module):
    """Two inputs that a caller may make depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.left(a).tanh() * self.right(b).sigmoid()
        return out


@pytest.mark.parametrize("create_graph", [False, True])
def test_inputs_that_depend_on_each_other(create_graph: bool) -> None:
    net, x = TwoSides(), torch.rand(3, 4, requires_grad=True)
    fast = FastAttackModel(net, **FLOAT32)
    for other in (x, 2 * x):
        (found,) = torch.autograd.grad(fast(x, other).sum(), x, create_graph=create_graph, retain_graph=True)
        (expected,) = torch.autograd.grad(net(x, other).sum(), x, create_graph=create_graph, retain_graph=True)
        torch.testing.assert_close(found, expected)


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


def test_a_float16_input_gets_a_finite_gradient() -> None:
    net, (x, y) = small_net().half(), batch(3)
    fast = FastAttackModel(net, **FLOAT32)
    huge = lambda logits, y: F.cross_entropy(logits.float(), y) * 1e8  # noqa: E731
    found = input_gradient(fast, x.half(), y, huge)
    assert found.dtype == torch.float16
    assert found.isfinite().all()
    assert (cosine(found, input_gradient(reference(net), x.half().double(), y)) > 0.99).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_inputs_in_another_dtype_than_the_models_with_and_without_gradient(dtype: torch.dtype) -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    with torch.no_grad():
        assert torch.equal(fast(x.to(dtype)), fast(x.to(dtype).float()))
    assert input_gradient(fast, x.to(dtype), y).dtype == dtype
    assert SafePGD(fast, eps=0.1, steps=2)(x.to(dtype), y).dtype == dtype
