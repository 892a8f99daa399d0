"""Modules in the ways in which people write them: right values and gradients, or an error that says what to do."""

import copy
import functools
import logging
import threading
import types
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fastadv_adapters import FastAttackModel

FLOAT32: Any = {"dtype": torch.float32}


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


def convolutional(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10))
    net(torch.rand(32, 3, 4, 4) * 2)
    return net.eval()


def images(n: int = 6) -> Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def tensors_of(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [t for value in output.values() for t in tensors_of(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors_of(value)]
    return [] if output is None else [t for value in vars(output).values() for t in tensors_of(value)]


def loss_of(output: Any) -> Tensor:
    parts = [t.abs() if t.is_complex() else t for t in tensors_of(output)]
    return sum((p * torch.linspace(-1, 1, p[0].numel()).view(p[0].shape)).sum() for p in parts)  # type: ignore[return-value]


def outcome(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """All output tensors without and with a gradient, and the gradients at all floating inputs."""
    with torch.no_grad():
        found = [t.clone() for t in tensors_of(model(*args, **kwargs))]

    def leaf(value: Any) -> Any:
        return value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tuple(map(leaf, args)), {key: leaf(value) for key, value in kwargs.items()}
    leaves = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.requires_grad]
    output = model(*args, **kwargs)
    gradients = torch.autograd.grad(loss_of(output), leaves)
    return [*found, *(t.detach() for t in tensors_of(output)), *gradients]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)


def agrees(model: nn.Module, *args: Any, **kwargs: Any) -> FastAttackModel:
    """The fast model, once its values and gradients have been found to be the plain model's."""
    args = args or (images(),) if not kwargs else args
    fast = FastAttackModel(model, **FLOAT32)
    expected = outcome(model, *args, **kwargs)
    close(outcome(fast, *args, **kwargs), expected)
    close(outcome(model, *args, **kwargs), expected)  # which is as it was
    return fast


def step(model: nn.Module) -> None:
    """Move every parameter, as an optimizer does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


# --- wrappers that forward attributes ---------------------------------------------------------------------------------


class Forwarding(nn.Module):
    """Asks the model inside for what it lacks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model((x - 0.5) / 0.25)
        return out


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:.*runs the module inside nn.DataParallel")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    "inside",
    [
        convolutional,
        lambda: compiled(convolutional()),
        lambda: nn.DataParallel(convolutional()),
        lambda: torch.fx.symbolic_trace(convolutional()),
        lambda: Forwarding(convolutional()),
        lambda: Forwarding(torch.fx.symbolic_trace(convolutional())),
    ],
    ids=["plain", "compiled", "data-parallel", "graph", "forwarding", "forwarding-graph"],
)
def test_a_wrapper_that_forwards_attributes_is_itself(inside: Callable[[], nn.Module]) -> None:
    model = Forwarding(inside())
    fast = agrees(model)
    assert fast.wrapped is model
    step(model)
    close(outcome(fast, images()), outcome(model, images()))
    close(outcome(FastAttackModel(nn.Sequential(model), **FLOAT32), images()), outcome(model, images()))


class Named(nn.Module):
    """A child of this name does not make it a compiled module."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = small()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._orig_mod(2 * x)
        return out


def test_a_child_of_the_name_that_torch_compile_uses() -> None:
    agrees(Named())


# --- forward on the instance ------------------------------------------------------------------------------------------


def bound(part: nn.Module) -> None:
    part.forward = part.forward


def bound_by_partial(part: nn.Module) -> None:
    part.forward = functools.partial(part.forward)


def by_closure(part: nn.Module) -> None:
    """As older versions of accelerate do."""
    before = part.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        assert isinstance(part, nn.Module)
        return before(*args, **kwargs) * 1.5

    part.forward = forward


def by_closure_in_closure(part: nn.Module) -> None:
    by_closure(part)
    by_closure(part)


def by_partial_of_a_function(part: Any) -> None:
    """As newer versions of accelerate do."""

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._old_forward(*args, **kwargs) * 1.5

    part._old_forward = part.forward
    part.forward = functools.update_wrapper(functools.partial(forward, part), part._old_forward)


def by_method_type(part: Any) -> None:
    part.forward = types.MethodType(lambda self, *args: type(self).forward(self, *args) * 1.5, part)


class Patch:
    """A callable object in the place of the forward."""

    def __init__(self, part: nn.Module) -> None:
        self.before = part.forward

    def __call__(self, *args: Any) -> Any:
        return self.before(*args) * 1.5

    def run(self, *args: Any) -> Any:
        return self.before(*args) * 1.5


def by_object(part: Any) -> None:
    part.forward = Patch(part)


def by_method_of_an_object(part: Any) -> None:
    part.forward = Patch(part).run


def by_compile(part: Any) -> None:
    part.forward = torch.compile(part.forward, backend="eager")


PATCHES = [bound, bound_by_partial, by_closure, by_closure_in_closure, by_partial_of_a_function, by_method_type]
PATCHES += [by_object, by_method_of_an_object, by_compile]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("where", [None, 0, 1, 2, 6], ids=["whole", "conv", "norm", "relu", "head"])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_forward_on_the_instance_runs_in_the_copy_as_it_does_in_the_model(patch: Any, where: int | None) -> None:
    model = convolutional()
    patch(model if where is None else model[where])
    fast = agrees(model)
    step(model)
    close(outcome(fast, images()), outcome(model, images()))


def test_a_forward_that_is_that_of_the_class_keeps_nothing_from_folding() -> None:
    model = convolutional()
    for part in model.modules():
        bound(part)
    assert "2 folded" in agrees(model).summary()


THE_MODEL: Any = small()


def test_a_forward_on_the_instance_that_names_the_model_is_refused() -> None:
    THE_MODEL.forward = lambda x: type(THE_MODEL).forward(THE_MODEL, x)
    with pytest.raises(ValueError, match="expected forward to be a method of the class"):
        FastAttackModel(THE_MODEL)


class Metric(nn.Module):
    """As in torchmetrics: wraps its own methods on the instance, and does so again when it is copied."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self._wrap()

    def _wrap(self) -> None:
        before = type(self).update.__get__(self)

        @functools.wraps(before)
        def update(*args: Any) -> None:
            assert isinstance(self, Metric)
            before(*args)

        vars(self)["update"] = update

    def update(self, x: Tensor) -> None:
        self.total = self.total + x.detach().sum()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "update"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._wrap()


class WithFunctions(nn.Module):
    """Functions that have enclosed the module, in every place that an attribute leads to."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.net, self.metric, self.scale = convolutional(), Metric(), nn.Parameter(torch.ones(10))
        self.place = place

        def scaled(x: Tensor, again: bool = False) -> Tensor:
            return scaled(self.net(x), again=True) if not again else x * self.scale

        class Held:
            pass

        held: Any = Held()
        held.run, held.inner = scaled, {"functions": [scaled]}
        self.places = {
            "dict": {"a": [{"b": scaled}]},
            "tuple": (1, (scaled,)),
            "dict-in-tuple": (1, ({0: scaled},)),
            "set": {scaled},
            "pair": Functions(scaled, 1),
            "object": held,
            "partial": functools.partial(scaled, again=False),
            "partial-of-a-lambda": functools.partial(lambda scale, x: self.net(x) * scale * self.scale, 1.0),
        }

    def find(self) -> Any:
        found: Any = self.places[self.place]
        if isinstance(found, dict):
            return found["a"][0]["b"]
        if isinstance(found, Functions):
            return found.run
        if isinstance(found, tuple):
            return found[1][0] if callable(found[1][0]) else found[1][0][0]
        if isinstance(found, set):
            return next(iter(found))
        return found if callable(found) else found.inner["functions"][0]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.find()(x)
        self.metric.update(out)
        return out


class Functions(NamedTuple):
    run: Callable[..., Tensor]
    number: int


@pytest.mark.parametrize("place", WithFunctions("dict").places)
def test_functions_that_have_enclosed_the_model_run_on_the_copy(place: str) -> None:
    model: Any = WithFunctions(place).eval()
    calls: list[nn.Module] = []
    fast = FastAttackModel(model, **FLOAT32)
    model.net.register_forward_hook(lambda module, *_: calls.append(module))
    close(outcome(fast, images()), outcome(model, images()))
    total = model.metric.total.clone()
    calls.clear()
    step(model)
    found = outcome(fast, images())
    assert calls
    assert model.net not in calls, "the original is not run"
    assert torch.equal(model.metric.total, total)
    close(found, outcome(model, images()))


def test_a_cached_method_is_refused() -> None:
    model: Any = small()
    model.cached = functools.lru_cache(model.forward)
    with pytest.raises(ValueError, match="free of the model itself, got cached of"):
        FastAttackModel(model)
    del model.cached
    model.forward = functools.lru_cache(model.forward)
    with pytest.raises(ValueError, match="expected forward to be a method of the class"):
        FastAttackModel(model)


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.body, self.head = way, convolutional()[:5], nn.Linear(32, 10)

    def _inner(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=True)  # type: ignore[no-any-return]

    def _whole(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).flatten(1))
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "whole":
            return checkpoint(self._whole, x, use_reentrant=True)  # type: ignore[no-any-return]
        if self.way == "sequential":
            x = checkpoint_sequential(self.body, 2, x, use_reentrant=True)
        elif self.way == "nested":
            x = checkpoint(self._inner, x, use_reentrant=True)
        elif self.way == "mixed":
            x = checkpoint(self._inner, x, use_reentrant=False)
        else:
            x = self._inner(x)
        out: Tensor = self.head(x.flatten(1))
        return out


@pytest.mark.parametrize("way", ["part", "whole", "sequential", "nested", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reentrant_checkpoints_give_the_gradients_that_they_give_to_backward(way: str, dtype: torch.dtype) -> None:
    model = Checkpointed(way)
    model.requires_grad_(False)  # PyTorch's own way to them is a backward pass into the image alone
    x, y = images().requires_grad_(), images().requires_grad_()
    loss_of(model(x)).backward()
    fast = FastAttackModel(model, dtype=dtype)
    loss_of(fast(y)).backward()
    (again,) = torch.autograd.grad(loss_of(fast(y)), y)
    assert x.grad is not None
    assert y.grad is not None
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    close([y.grad, again], [x.grad, x.grad], tolerance)
    z = images(2).requires_grad_()
    (first,) = torch.autograd.grad(loss_of(fast(z).softmax(1)), z, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), z)[0].abs().amax() > 0


def test_a_checkpoint_of_others_is_left_as_it_is() -> None:
    model, before = Checkpointed("part"), torch.utils.checkpoint.CheckpointFunction
    outcome(FastAttackModel(model, **FLOAT32), images())
    assert torch.utils.checkpoint.CheckpointFunction is before
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        torch.autograd.grad(loss_of(model(x)), x)


# --- autocast of the model's own --------------------------------------------------------------------------------------


class OwnAutocast(nn.Module):
    """Runs its body, or its batch norms alone, under other rules than the rest."""

    def __init__(self, around: str, **options: Any) -> None:
        super().__init__()
        self.around, self.options = around, options
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(32, 10)
        self.free = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        region = torch.autocast("cpu", **self.options)
        x = self.free(x)
        if self.around == "norm":
            x = self.conv(x).relu()
            with region:
                x = self.norm(x.float() if not self.options.get("enabled", True) else x)
        else:
            with region:
                x = self.conv(x).relu()
                x = self.norm(x)
        out: Tensor = self.head(x.float().flatten(1))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("around", ["norm", "all"])
@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"enabled": False}], ids=str)
@pytest.mark.filterwarnings("ignore:.*run in float32, since")
def test_an_autocast_region_of_the_models_own(dtype: torch.dtype, around: str, options: Any) -> None:
    torch.manual_seed(0)
    model = OwnAutocast(around, **options).eval()
    close(outcome(FastAttackModel(model, dtype=dtype), images()), outcome(model, images()), 0.05)


# --- tensors in unusual places ----------------------------------------------------------------------------------------


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(torch.randn(48, 48) / 7) for _ in range(2)])
        self.named = nn.ParameterDict({"head": nn.Parameter(torch.randn(10, 48) / 7)})
        self.shift = nn.ParameterList([torch.zeros(48), torch.ones(48)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for weight in self.layers:
            x = torch.relu(x @ weight + self.shift[1])
        out: Tensor = x @ self.named["head"].T
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.head = nn.Linear(48, 16), nn.Linear(16, 48), nn.Linear(48, 10)
        self.up.weight = nn.Parameter(self.up.weight.detach())
        self.again = self.down
        self.head2 = nn.Linear(48, 10)
        self.head2.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.up(self.again(x.flatten(1)).relu())) + self.head2(x.flatten(1))
        return out


def parametrized() -> nn.Module:
    model = small()
    parametrizations.weight_norm(model[1])
    parametrizations.orthogonal(model[3])

    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + weight.flip(0)

    parametrize.register_parametrization(model[1], "bias", Symmetric())
    return model


def fused() -> nn.Module:
    model: Any = convolutional()
    return nn.Sequential(fusion.fuse_conv_bn_eval(model[0], model[1]), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


class Properties(nn.Module):
    """Computes its weight anew each time; holds a lock, a logger, a generator, and weak references around itself."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.scale, self.child = nn.Parameter(torch.randn(10, 48)), nn.Parameter(torch.ones(())), Child()
        self.lock, self.again, self.event = threading.Lock(), threading.RLock(), threading.Event()
        self.log, self.random = logging.getLogger("model"), torch.Generator().manual_seed(3)
        self.itself: Any = weakref.ref(self)
        self.go: Any = weakref.WeakMethod(self.run)
        self.parts: Any = {"all": [weakref.ref(self.child)]}
        self.child.parent = weakref.ref(self)
        self.pair, self.listed = (weakref.ref(self.child),), {weakref.ref(self.child)}
        self.by_name: Any = weakref.WeakValueDictionary(child=self.child)
        self.names: Any = weakref.WeakKeyDictionary({self.child: "child"})
        self.known: Any = weakref.WeakSet([self.child])
        vars(self)["proxy"] = weakref.proxy(self.child)

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.raw / self.raw.norm()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        run: Any = self.go()
        assert run.__self__ is self
        out: Tensor = run(x)
        return out

    def run(self, x: Tensor) -> Tensor:
        with self.lock, self.again:
            self.log.debug("forward")
            me, child = self.itself(), next(r() for r in self.parts["all"])
            assert me is self
            references: list[Any] = [*self.pair, *self.listed]
            for found in (child, self.by_name["child"], *(r() for r in references), *self.known):
                assert found is self.child
            assert vars(vars(self)["proxy"]) is vars(self.child)
            assert self.names[child] == "child"
            out: Tensor = child(x.flatten(1) @ me.weight.T)
            return out


class Child(nn.Module):
    parent: Any

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.parent().scale
        return out


class Slots(nn.Module):
    __slots__ = ("factor", "unset")

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.body = 3.0, small()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) * self.factor
        return out


class Called(nn.Module):
    """Overrides ``__call__``, which runs before any forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convolutional()

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = super().__call__(x * 2) + 1
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class CalledNorm(nn.BatchNorm2d):
    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = super().__call__(x * 2) + 1
        return out


class CalledConv(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = super().__call__(x * 2) + 1
        return out


def with_called(place: int, made: nn.Module) -> nn.Module:
    model = convolutional()
    vars(made).update(vars(model[place]))
    model[place] = made
    return model


class Cached(nn.Module):
    """A method with a cache on the class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def grid(self, n: int) -> Tensor:
        return torch.linspace(0, 1, n)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x + self.grid(4))
        return out


def doubled(x: Tensor) -> Tensor:
    return x * 2


class Scripted(nn.Module):
    """Keeps functions of TorchScript and of torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.twice = small(), torch.jit.script(doubled)
        self.each = torch.vmap(self.one)

    def one(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x[None])[0]
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.twice(self.each(x))
        return out


class Functional(nn.Module):
    """Calls a part with other weights, made of a dictionary that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convolutional()
        self.weights = dict(self.body.named_parameters())

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: weight * 2 for name, weight in self.weights.items()}
        out: Tensor = torch.func.functional_call(self.body, weights, (x,))
        return out


class CompiledParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = compiled(convolutional()[:5]), compiled(nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).flatten(1))
        return out


class ManyWrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.DataParallel(convolutional())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


MODULES: dict[str, Callable[[], nn.Module]] = {
    "parameter-lists": Lists,
    "tied": Tied,
    "parametrized": parametrized,
    "fused": fused,
    "properties": Properties,
    "slots": Slots,
    "called": Called,
    "called-norm": lambda: with_called(1, CalledNorm(8)),
    "called-conv": lambda: with_called(0, CalledConv(3, 8, 3)),
    "cached": Cached,
    "scripted": Scripted,
    "functional": Functional,
    "compiled-parts": CompiledParts,
    "data-parallel-inside": ManyWrapped,
}


@pytest.mark.filterwarnings("ignore:.*runs the module inside nn.DataParallel")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.filterwarnings("ignore:.*batch norm is folded into 0 layers only")
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_a_module_is_right_and_followed(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    fast = agrees(model)
    network = fast._networks.folded.network
    step(model)
    close(outcome(fast, images()), outcome(model, images()))
    assert fast._networks.folded.network is network, "values alone need no new network"
    close(
        outcome(copy.deepcopy(fast) if make not in (Properties, Slots, Scripted) else fast, images()),
        outcome(model, images()),
    )


# --- arguments and outputs --------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor | None = None


@dataclass
class Result:
    logits: Tensor
    loss: Tensor | None = None


class ModelOutput(OrderedDict[str, Any]):
    """As in transformers: a dictionary and a data class at once, where items and attributes are the same."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            if getattr(self, field.name) is not None:
                OrderedDict.__setitem__(self, field.name, getattr(self, field.name))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]


@dataclass
class Classified(ModelOutput):
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    inner: Any = None


class Bare(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Returning(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.form = small(), form

    def forward(self, *, pixel_values: Tensor, scale: float = 1.0) -> Any:
        return self.form(self.body(pixel_values * scale))


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "named-tuple": lambda z: Pair(z, z * 2),
    "data-class": lambda z: Result(z, z.mean(1)),
    "model-output": lambda z: Classified(logits=z, hidden_states=(z * 2, z * 3)),
    "nested": lambda z: Classified(logits=z, inner=Classified(logits=z * 2)),
    "in-a-list": lambda z: [Classified(logits=z), {"more": Result(z * 2)}],
    "dictionary": lambda z: Bare(logits=z, more=[z * 2]),
    "namespace": lambda z: SimpleNamespace(logits=z, inner=SimpleNamespace(more=z * 2)),
    "user-dictionary": lambda z: UserDict(logits=z, more=Result(z * 2)),
    "ordered": lambda z: OrderedDict(logits=z),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_outputs_come_back_as_what_they_were(form: Callable[[Tensor], Any]) -> None:
    model, x = Returning(form).eval(), images()
    close(
        outcome(FastAttackModel(model, **FLOAT32), pixel_values=x, scale=2.0), outcome(model, pixel_values=x, scale=2.0)
    )
    ours, theirs = FastAttackModel(model, **FLOAT32)(pixel_values=x.requires_grad_()), model(pixel_values=x)
    assert type(ours) is type(theirs)
    if isinstance(ours, Classified):
        assert ours.logits is ours["logits"] is ours[0]
        assert ours.logits is not None
        assert ours.logits.requires_grad
        assert list(ours) == list(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
    if isinstance(ours, Bare):
        assert ours.__getattr__("logits") is ours["logits"]
