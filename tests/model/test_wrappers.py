"""Models that come inside something else: DataParallel, DistributedDataParallel, torch.compile, averaged copies."""

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from fastadv_adapters import FastAttackModel, FastAttackWarning
from tests.support.tools import batch, cosine, fingerprint, input_gradient, reference, settle, small_net

FLOAT32: Any = {"dtype": torch.float32}
Wrap = Callable[[nn.Module], nn.Module]


class Normalise(nn.Module):
    """Images to the statistics of a data set, which are buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.49, 0.48, 0.45]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.25, 0.24, 0.26]).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


@pytest.fixture
def process_group() -> Iterator[None]:
    """One process, nobody to talk to."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        distributed.destroy_process_group()


def compiled(net: nn.Module) -> nn.Module:
    module = torch.compile(net, backend="eager")
    assert isinstance(module, nn.Module)
    return module


WRAPPERS: dict[str, Wrap] = {
    "data-parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "compiled": compiled,
    "compiled-distributed": lambda net: compiled(nn.parallel.DistributedDataParallel(net)),
}
wrapped = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.filterwarnings("ignore:.*runs the module inside nn.DataParallel"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # from inside torch.compile
]


def agrees(fast: FastAttackModel, plain: nn.Module) -> None:
    x, y = batch(4)
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference(plain), x.double(), y)) > 0.9999).all()


def train_a_step(model: nn.Module) -> None:
    """As people do: forward and backward through the wrapper, its own parameters in the optimizer."""
    x, y = batch(6, seed=3)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


@wrapped
def test_the_module_inside_is_used_and_followed(wrap: Wrap) -> None:
    net = small_net()
    outside = wrap(net)
    fast = FastAttackModel(outside, **FLOAT32)
    assert fast.wrapped is net
    agrees(fast, net)
    network, before = fast._networks.folded.network, input_gradient(fast, *batch(4))
    for _ in range(2):
        train_a_step(outside)
        agrees(fast, net)
    assert (cosine(input_gradient(fast, *batch(4)), before) < 0.999).any(), "the step must be seen"
    assert fast._networks.folded.network is network, "a change of values needs no new network"


@wrapped
def test_a_wrapper_behind_a_normalisation_is_passed_through(wrap: Wrap) -> None:
    net = small_net()
    model = nn.Sequential(Normalise(), wrap(net))
    plain = nn.Sequential(model[0], net)
    before = fingerprint(net)
    fast = FastAttackModel(model, **FLOAT32)
    agrees(fast, plain)
    assert fast.wrapped is model
    assert "5 folded" in fast.summary(), "folding reaches through the wrapper"
    assert fingerprint(net) == before
    network = fast._networks.folded.network
    train_a_step(model)
    agrees(fast, plain)
    assert fast._networks.folded.network is network, "what a wrapper keeps for itself is no change of the model"


def test_data_parallel_anywhere_warns() -> None:
    for model in (nn.DataParallel(small_net()), nn.Sequential(Normalise(), nn.DataParallel(small_net()))):
        with pytest.warns(FastAttackWarning, match="runs the module inside nn.DataParallel on one device .*#data-par"):
            FastAttackModel(model, **FLOAT32)


@wrapped
def test_a_hook_on_the_wrapper_stays(wrap: Wrap) -> None:
    net = small_net()
    outside = wrap(net)
    outside.register_forward_hook(lambda module, inputs, output: output * torch.linspace(-1, 1, 10))
    fast = FastAttackModel(outside, **FLOAT32)
    agrees(fast, nn.Sequential(net, Weighted()))


class Weighted(nn.Module):
    """What the hook does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(-1, 1, 10, dtype=x.dtype)


def test_a_model_compiled_in_place() -> None:
    net = small_net()
    net.compile(backend="eager")
    fast = FastAttackModel(net, **FLOAT32)
    assert "5 folded" in fast.summary()
    agrees(fast, small_net())
    train_a_step(net)
    agrees(fast, net)


class CompiledMethod(nn.Module):
    """Compiles a part of itself, and so keeps a function that runs on this very object."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.run: Any = torch.compile(self.body, backend="eager")

    def body(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).tanh()
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.run(x)
        return out


class Closures(nn.Module):
    """Keeps functions that reach the model: in a dictionary, as closures or as bound methods inside."""

    def __init__(self, *, free: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.heads = {"tanh": torch.tanh if free else lambda x: x.tanh() * self.layer.weight.sum()}
        self.scales = [lambda x: x * 2]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.heads["tanh"](self.scales[0](self.layer(x)))
        return out


class Decorated(nn.Module):
    """Keeps functions that call each other, one of which reaches the model from a function inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.turns: Any = self.functions()

    def functions(self) -> Any:
        def first(x: Tensor, again: bool = True) -> Tensor:
            return second(x) if again else x

        def second(x: Tensor) -> Tensor:
            layers = dict(self.named_children())
            out: Tensor = layers["layer"](first(x, again=False))
            return out

        return first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.turns(x)
        return out


class ReachedByName(nn.Module):
    """Keeps a function that names the model as a global."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.run: Any = lambda x: [THE_MODEL.layer(row) for row in x]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.run(x))


THE_MODEL: Any = ReachedByName()


def test_functions_that_would_run_on_the_original_are_refused() -> None:
    with pytest.raises(ValueError, match=r"free of the model itself, got run of .*Make it a method of the class"):
        FastAttackModel(THE_MODEL)


@pytest.mark.parametrize("make", [CompiledMethod, lambda: Closures(free=False), Decorated])
def test_functions_that_have_enclosed_the_model_run_on_the_copy(make: Callable[[], nn.Module]) -> None:
    net, x = make(), torch.rand(3, 4)
    fast = FastAttackModel(net, **FLOAT32)
    for _ in range(2):
        found = input_gradient(fast, x, x, lambda out, _: out.sum())
        torch.testing.assert_close(found, input_gradient(net, x, x, lambda out, _: out.sum()))
        net.get_submodule("layer").weight.data = torch.rand(3, 4)
    calls: list[nn.Module] = []
    net.get_submodule("layer").register_forward_hook(lambda module, *_: calls.append(module))
    fast(x)
    assert calls
    assert net.get_submodule("layer") not in calls, "the original is not run"


class Defaults(nn.Module):
    """Functions that have layers as the defaults of their arguments, or in a list that they have enclosed."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        layers = [self.layer, self.norm]
        self.rows = {"eps": 0.5}

        def keyword(x: Tensor, *, norm: Any = self.norm, rows: Any = self.rows) -> Tensor:
            return norm(self.layer(x)) * rows["eps"]  # type: ignore[no-any-return]

        def method(run: Any, x: Tensor, layers: Any = (self.layer, {"norm": self.norm})) -> Tensor:
            return run.norm(layers[1]["norm"](layers[0](x)))  # type: ignore[no-any-return]

        ways: dict[str, list[Any]] = {
            "lambdas": [lambda x, layer=layer: layer(x).sin() for layer in layers],
            "free": [lambda x, layer=layer: layer(x).cos() for layer in self._modules.values()],
            "keyword": [keyword],
            "functions": [lambda x, run=keyword: run(x)],
            "container": [types.MethodType(method, self)],
            "list": [lambda x: layers[1](layers[0](x))],
        }
        self.calls: Any = ways[way]

    def forward(self, x: Tensor) -> Tensor:
        for call in self.calls:
            x = call(x)
        return x


@pytest.mark.parametrize("way", ["lambdas", "free", "keyword", "functions", "container", "list"])
def test_functions_that_have_the_model_as_a_default_run_on_the_copy(way: str) -> None:
    net, x = Defaults(way), torch.rand(5, 4)
    calls, mean = list[nn.Module](), net.norm.running_mean
    for part in (net.layer, net.norm):
        part.register_forward_hook(lambda module, *_: calls.append(module))
    fast = FastAttackModel(net, **FLOAT32)
    assert mean is not None
    before = mean.clone()
    input_gradient(fast, x, x, lambda out, _: out.sin().sum())  # the self-check runs the model itself, too
    calls.clear()
    found = input_gradient(fast, x, x, lambda out, _: out.sin().sum())
    assert torch.equal(mean, before)
    assert calls
    assert not {net.layer, net.norm} & set(calls), "the original is not run"
    torch.testing.assert_close(found, input_gradient(net.eval(), x, x, lambda out, _: out.sin().sum()))


def test_functions_that_do_not_are_not() -> None:
    net, x = Closures(free=True), torch.rand(3, 4)
    found = input_gradient(FastAttackModel(net, **FLOAT32), x, x, lambda out, _: out.sum())
    torch.testing.assert_close(found, input_gradient(net, x, x, lambda out, _: out.sum()))


# --- averaged copies --------------------------------------------------------------------------------------------------


def test_an_averaged_model_is_followed() -> None:
    net = small_net()
    averaged = AveragedModel(net, avg_fn=get_ema_avg_fn(0.5))
    fast = FastAttackModel(averaged, **FLOAT32)
    agrees(fast, averaged)
    for _ in range(2):
        before = input_gradient(fast, *batch(4))
        train_a_step(net)
        assert torch.equal(input_gradient(fast, *batch(4)), before), "the average has not moved yet"
        averaged.update_parameters(net)
        assert (cosine(input_gradient(fast, *batch(4)), before) < 0.9999).any()
        agrees(fast, averaged)


def average_by_data(mean: nn.Module, net: nn.Module) -> None:
    """As many training scripts do; nothing of it is recorded."""
    for ours, theirs in zip(mean.state_dict().values(), net.state_dict().values(), strict=True):
        if ours.is_floating_point():
            ours.data.mul_(0.5).add_(theirs.data, alpha=0.5)


def test_an_average_kept_through_data_is_noticed_on_a_processor() -> None:
    net, mean = small_net(), small_net()
    fast = FastAttackModel(mean, **FLOAT32)
    agrees(fast, mean)
    train_a_step(net)
    average_by_data(mean, net)
    agrees(fast, mean)


def test_an_average_loaded_or_copied_under_no_grad_is_noticed() -> None:
    net, mean = small_net(), small_net()
    fast = FastAttackModel(mean, **FLOAT32)
    agrees(fast, mean)
    settle(net)
    mean.load_state_dict(net.state_dict())
    agrees(fast, mean)
    with torch.no_grad():
        for ours, theirs in zip(mean.parameters(), small_net(seed=5).parameters(), strict=True):
            ours.lerp_(theirs, 0.5)
    agrees(fast, mean)


@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_compiled_code_calls_a_fast_model_as_it_is(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: Any = FastAttackModel.forward  # by the tests, with code that is not made to be compiled
    monkeypatch.setattr(FastAttackModel, "forward", watched.__wrapped__.__wrapped__)
    net, (x, y) = small_net().eval(), batch(4)
    fast = FastAttackModel(net, **FLOAT32, engine=engine)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(model(x) * 2, y)

    around = torch.compile(loss, backend="eager")
    for _ in range(2):
        x = x.detach().requires_grad_()
        found, expected = torch.autograd.grad(around(fast, x), x), torch.autograd.grad(loss(net, x), x)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(compiled(fast)(x), net(x), rtol=1e-3, atol=1e-5)
    assert fast.engine == engine
