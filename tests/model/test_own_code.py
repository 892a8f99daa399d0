"""What a model's own code may do with its layers, weights and results: fast models follow, and nothing else notices."""

import functools
import random
import warnings
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.kernels import calls, linear
from tests.support.tools import settle

F32: dict[str, Any] = {"dtype": torch.float32, "decisions": "fast", "engine": "eager"}


def gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    output = output[0] if isinstance(output, tuple) else output
    return output.detach(), torch.autograd.grad(output.sin().sum(), leaf)[0]


def agree(fast: nn.Module, model: nn.Module, x: Tensor, within: float = 1e-4) -> None:
    """Both outputs and gradients are the same."""
    for ours, theirs in zip(gradient(fast, x), gradient(model, x), strict=True):
        assert float((ours.float() - theirs).norm()) <= within * float(theirs.norm())
        assert float(theirs.norm()) > 0


class Images(nn.Module):
    """A head for images of 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)

    def classify(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(image.mean((2, 3)))
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)], ids=["rows", "tokens"])
@pytest.mark.parametrize("write", ["relu", "sum"])
def test_operators_in_place_behind_linear_layers(
    write: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "LEAST", 0)
    monkeypatch.setattr(linear, "PRODUCTS", 0)
    monkeypatch.setattr(calls, "HAS_AVX512", True)
    monkeypatch.setattr(calls, "HAS_AMX", False)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = F.relu(y, inplace=True) if write == "relu" else y.add_(1.0)
            return self.second(y)  # type: ignore[no-any-return]

    net = Net().eval()
    fast = FastAttackModel(net, dtype=dtype, engine="eager")
    agree(fast, net, torch.randn(shape), 1e-4 if dtype == torch.float32 else 0.05)
    assert fast.dtype == dtype
    assert not fast._networks.notes


class Replaced(Images):
    """Convolves with a weight that depends on the input as soon as its gate opens."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.conv, self.gate, self.part = nn.Conv2d(8, 8, 3), nn.Parameter(torch.zeros(())), part

    def forward(self, x: Tensor) -> Tensor:
        x, weight, bias = F.silu(x), self.conv.weight, self.conv.bias
        by = 1 + self.gate * x.mean()
        if self.part == "weight":
            return self.classify(self.conv._conv_forward(x, weight * by, bias))
        own: dict[str, Any] = {"bias": None if bias is None else bias * by}
        return self.classify(torch.func.functional_call(self.conv, own, (x,)))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_weights_that_come_to_depend_on_the_input(part: str) -> None:
    net = Replaced(part).eval()
    fast, x = FastAttackModel(net, **F32), torch.randn(3, 8, 6, 6)
    agree(fast, net, x)
    net.gate.data.fill_(1.0)
    fast.update()
    agree(fast, net, x)
    agree(fast, net, x + 1)


class Reads(nn.Module):
    """Reads the weight of its layer where a trace sees a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(8, 8, 3, padding=1), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.conv.state_dict()["weight"]
        return self.conv(x), self.gate * F.conv2d(x, weight, padding=1)


class Outside(Images):
    """The batch norm is outside of the module that reads the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.norm = Reads(), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.reads(x)
        return self.classify(self.norm(one) + other)


def test_weights_read_unseen_are_not_folded_into() -> None:
    torch.manual_seed(0)
    net: Any = settle(Outside()).eval()
    fast, x = FastAttackModel(net, **F32), torch.randn(3, 8, 6, 6)
    agree(fast, net, x)
    net.reads.gate.data.fill_(1.0)
    fast.update()
    agree(fast, net, x)


class Masked(nn.Conv2d):
    """Multiplies its weight by what is put on that."""

    def forward(self, input: Tensor) -> Tensor:
        given: Any = self.weight
        masks = given.masks
        mask: Tensor = masks["a"] if isinstance(masks, dict) else masks
        return F.conv2d(input, self.weight * mask, self.bias)


@pytest.mark.parametrize("how", ["in place", "through data"])
@pytest.mark.parametrize("deep", [False, True])
def test_tensors_put_on_weights_are_followed(deep: bool, how: str) -> None:
    net = nn.Sequential(Masked(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
    weight: Any = net[0].weight
    mask = torch.ones_like(weight)
    weight.masks = {"a": mask} if deep else mask
    x = torch.randn(3, 8, 6, 6)
    net(x)
    fast = FastAttackModel(net, **F32)
    agree(fast, net, x)
    if how == "in place":
        mask[:4] = 0
    else:
        mask.data[:4] = 0
        fast.update()
    agree(fast, net, x)


def test_functions_put_on_weights_are_shared_with_what_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "STORE", torch.zeros(7, 11, 13))
    seen = list[tuple[int, ...]]()
    original = Tensor.clone

    def noted(self: Tensor, **options: Any) -> Tensor:
        seen.append(tuple(self.shape))
        return original(self, **options)

    def load(parameter: Tensor, loaded: Tensor) -> None:
        parameter.copy_(loaded)

    net: Any = nn.Linear(6, 5)
    net.weight.weight_loader = load
    monkeypatch.setattr(Tensor, "clone", noted)
    fast = FastAttackModel(net, **F32)
    assert seen
    assert (7, 11, 13) not in seen
    networks: Any = fast._networks
    for network in (networks.twin.engine.network, networks.fast.network):
        assert network.weight.weight_loader is load


def test_attributes_of_buffers_are_carried() -> None:
    class Moved(Images):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("place", torch.randn(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            given: Any = self.place
            return self.classify(F.silu(x + given * given.scale))

    net: Any = Moved().eval()
    net.place.scale = 2.0
    fast = FastAttackModel(net, **F32)
    agree(fast, net, torch.randn(3, 8, 6, 6))
    assert not fast._networks.notes


def test_what_was_handed_out_stays_as_it_is() -> None:
    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prototypes = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            directions = F.normalize(self.prototypes)
            return x @ directions.t(), directions

    net = Prototypes().eval()
    fast, x = FastAttackModel(net, **F32), torch.randn(3, 6)
    for _ in range(3):
        fast(x.requires_grad_())
    before = fast(x)[1]
    kept = before.clone()
    with torch.no_grad():
        net.prototypes.add_(1.0)
    after = fast(x)[1]
    assert torch.equal(before, kept)
    torch.testing.assert_close(after, net(x)[1])
    assert not torch.equal(before, after)


def test_a_partialmethod_for_a_forward_is_no_change() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def _run(self, x: Tensor, flag: bool) -> Tensor:
            return self.layer(x) * (2 if flag else 1)  # type: ignore[no-any-return]

        forward = functools.partialmethod(_run, flag=True)

    net = Net().eval()
    fast, x = FastAttackModel(net, **F32), torch.randn(3, 6, requires_grad=True)
    updates = fast._networks.updates
    torch.autograd.grad((fast(x) + fast(x + 1)).sum(), x)
    assert fast._networks.updates == updates
    agree(fast, net, x.detach())
    Net.forward = functools.partialmethod(Net._run, flag=False)
    agree(fast, net, x.detach())


def test_no_class_is_announced() -> None:
    found = list[type]()

    class Known(nn.Module):
        def __init_subclass__(cls, *, key: str, **options: Any) -> None:
            super().__init_subclass__(**options)
            found.append(cls)

    class Net(Known, key="net"):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ F.normalize(self.weight).t()

    net = Net()
    fast = FastAttackModel(net, **F32)
    agree(fast, net, torch.randn(3, 6))
    assert found == [Net]


def test_functions_in_a_queue_run_on_the_copy() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)
            run: Any = lambda x: self.norm(self.layer(x))  # noqa: E731
            self.steps = deque([run])

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x)
            return x

    net: Any = settle(Net()).train()
    mean: Tensor = net.norm.running_mean
    before = mean.clone()
    fast = FastAttackModel(net, **F32)
    x = torch.randn(3, 6)
    found = gradient(fast, x)
    assert torch.equal(mean, before)
    for ours, theirs in zip(found, gradient(net.eval(), x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_norms_that_draw_leave_the_generators_alone() -> None:
    class Noisy(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            noise = torch.randn(1, self.num_features, 1, 1) * random.random()
            return super().forward(input) + 0.1 * noise

    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3), Noisy(4), nn.Flatten()))
    before = torch.get_rng_state(), random.getstate()
    FastAttackModel(net, **F32)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


class Unrolled(nn.Module):
    """Runs as many layers as it is told, one after the other: the same one again, or one of each kind."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.layers, self.tied = nn.ModuleList(nn.Linear(6, 6) for _ in range(1 if tied else 3)), tied
        self.skip = 0.5

    def forward(self, x: Tensor, depth: int) -> Tensor:
        for step in range(depth):
            x = self.skip * x + self.layers[0 if self.tied else step](x).tanh()
        return x


@pytest.mark.parametrize("skip", [0.0, 0.5])
@pytest.mark.parametrize("tied", [False, True])
def test_layers_that_come_to_follow_each_other(tied: bool, skip: float) -> None:
    torch.manual_seed(0)
    net = Unrolled(tied).eval()
    net.skip = skip
    fast, x = FastAttackModel(net, dtype=torch.bfloat16, engine="eager"), torch.randn(8, 6)

    def at(model: nn.Module, depth: int) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf, depth).sin().sum(), leaf)[0]

    for depth in (1, 3, 2, 1):
        found, wanted = at(fast, depth), at(net, depth)
        assert float(F.cosine_similarity(found, wanted).min()) > 0.99
        assert float((found - wanted).norm()) < 0.05 * float(wanted.norm())


class WritesIntoItsInput(Images):
    def forward(self, x: Tensor) -> Tensor:
        return self.classify(F.silu(x.sub_(0.5).mul_(2)))


@pytest.mark.parametrize("early_stop", [False, True])
def test_attacks_on_models_that_write_into_their_input(early_stop: bool) -> None:
    net = WritesIntoItsInput().eval()
    x, y = torch.rand(6, 8, 5, 5), torch.arange(6) % 5
    found = SafePGD(net, eps=0.03, steps=4, early_stop=early_stop)(x, y)
    assert float((found - x).abs().max()) <= 0.0301
    assert float(found.min()) >= 0
    fast, leaf = FastAttackModel(net, dtype=torch.float32, decisions="exact"), x.clone().requires_grad_()
    fast(leaf)
    assert torch.equal(leaf, x)


def test_numbers_that_change_in_each_pass_are_not_all_kept() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor, by: float) -> Tensor:
            return F.linear(x, self.weight * by)

    net, x = Scaled().eval(), torch.randn(3, 6)
    fast = FastAttackModel(net, **F32)
    for by in map(float, range(1, 40)):
        torch.testing.assert_close(fast(x.requires_grad_(), by), net(x, by))
    memos: Any = {
        id(p): vars(p)["use_of_memo"].memo for p in fast._networks.folded.network.modules() if "use_of_memo" in vars(p)
    }
    assert memos
    assert all(len(memo._kept) < 30 for memo in memos.values())


def test_a_step_between_forward_and_backward_brings_no_audit() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    x = torch.randn(8, 3, 2, 2)
    wanted = gradient(net, x)[1]
    fast = FastAttackModel(net, dtype=torch.bfloat16, engine="eager")
    optimizer, leaf = torch.optim.SGD(net.parameters(), lr=5.0), x.clone().requires_grad_()
    output = fast(leaf)
    net(x).sum().backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = torch.autograd.grad(output.sin().sum(), leaf)
    assert float(F.cosine_similarity(found.flatten(1), wanted.flatten(1)).min()) > 0.98


def test_logits_have_their_dtype_under_transforms() -> None:
    net = nn.Linear(6, 5)
    fast = FastAttackModel(net, dtype=torch.float32, logits_dtype=torch.float64)
    found = torch.func.vmap(lambda x: fast(x[None])[0])(torch.randn(3, 6))
    assert found.dtype == torch.float64


def test_inputs_out_of_reach_that_want_a_gradient_are_an_error() -> None:
    class Box:
        def __init__(self, delta: Tensor) -> None:
            self.delta = delta

    class Boxed(nn.Linear):
        def forward(self, x: Tensor, box: Any = None) -> Tensor:
            return super().forward(x + box.delta)

    net, x = Boxed(6, 5), torch.randn(3, 6, requires_grad=True)
    fast, box = FastAttackModel(net, **F32), Box(torch.zeros(6, requires_grad=True))
    with pytest.raises(TypeError, match="inside a Box"):
        fast(x, box)
    with torch.no_grad():
        fast(x, box)
    box.delta = torch.ones(6)
    torch.testing.assert_close(fast(x, box), net(x, box))


class Turns(nn.Module):
    """Two layers side by side, and one after the other for bright inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if x.detach().mean() < 1:
            side: Tensor = self.a(h).tanh() + self.b(h).tanh()
            return side
        found: Tensor = self.b(self.a(h).tanh()).tanh() + 0.15 * h
        return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_last_layers_that_turn_to_follow_each_other(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = Turns().eval(), torch.rand(8, 6)
    fast = FastAttackModel(net, dtype=dtype, engine="eager")
    for by in (0.0, 1.0, 0.0, 1.0):
        found, wanted = (gradient(model, x + by)[1] for model in (fast, net))
        assert float(F.cosine_similarity(found, wanted).min()) > 0.99


class AsksForItsWeights(nn.Module):
    """Scores inputs by gradients of its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            found = torch.autograd.grad(self.net(x).logsumexp(1).sum(), list(self.net.parameters()))
        scored: Tensor = self.net(x) * sum(part.norm() for part in found)
        return scored


@pytest.mark.filterwarnings("ignore:FastAttackModel")
def test_a_model_that_asks_for_gradients_of_its_weights_without_a_gradient_of_its_input() -> None:
    torch.manual_seed(0)
    net, x = AsksForItsWeights().eval(), torch.rand(4, 3, 2, 2)
    fast = FastAttackModel(net, **F32)
    exact = fast.view(decisions="exact")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(exact(x), net(x))
    agree(fast, net, x)
