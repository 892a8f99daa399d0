"""A model whose own ``train()`` does more than set flags is attacked as it is in eval mode."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, compare, evaluate


class Smoothed(nn.Module):
    """Noise in training mode only, by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.sigma = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)), 0.5

    def train(self, mode: bool = True) -> "Smoothed":
        super().train(mode)
        self.sigma = 0.5 if mode else 0.0
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.sigma * torch.randn_like(x))  # type: ignore[no-any-return]


class SwitchesByEval(Smoothed):
    def train(self, mode: bool = True) -> "SwitchesByEval":
        nn.Module.train(self, mode)
        return self if mode else self.eval()

    def eval(self) -> "SwitchesByEval":
        self.sigma = 0.0
        for part in self.modules():
            part.training = False
        return self


class OtherGraph(Smoothed):
    """As torchvision's feature extractors, one of two networks in the place of another."""

    def __init__(self) -> None:
        super().__init__()
        self.now = "loud"

    def train(self, mode: bool = True) -> "OtherGraph":
        nn.Module.train(self, mode)
        self.now = "loud" if mode else "silent"
        return self

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.now)(x)  # type: ignore[no-any-return]

    def loud(self, x: Tensor) -> Tensor:
        return self.net(F.dropout(x, 0.5, True))  # type: ignore[no-any-return]

    def silent(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class Merges(Smoothed):
    """As adapters of low rank that are merged in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.sigma, self.merged = 0.0, False
        self.down, self.up = nn.Parameter(torch.randn(2, 288)), nn.Parameter(torch.randn(5, 2))

    def train(self, mode: bool = True) -> "Merges":
        nn.Module.train(self, mode)
        if self.merged == mode:
            self.net[3].weight.data += (self.up @ self.down).detach() * (-1 if mode else 1)  # type: ignore[operator]
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        features = self.net[:3](x)
        output: Tensor = self.net[3](features)
        return output if self.merged else output + F.linear(features, self.up @ self.down)


KINDS = [Smoothed, SwitchesByEval, OtherGraph, Merges]


def gradient(network: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    output = network(leaf)
    return output.detach(), torch.autograd.grad(output.square().sum(), leaf)[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_attacked_in_eval_mode(kind: type[Smoothed], training: bool) -> None:
    torch.manual_seed(0)
    model, x = kind().train(training), torch.rand(4, 3, 8, 8)
    before = {k: v for k, v in vars(model).items() if not isinstance(v, dict)}
    weights = copy.deepcopy(model.state_dict())
    fast = FastAttackModel(model, dtype=torch.float32)
    output, wanted = gradient(copy.deepcopy(model).eval(), x)
    for network in (fast, fast.view(full_precision=True), fast.view(decisions="exact")):
        found, ours = gradient(network, x)
        torch.testing.assert_close((found, ours), (output, wanted), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), output, rtol=1e-3, atol=1e-4)
    assert {k: v for k, v in vars(model).items() if not isinstance(v, dict)} == before
    assert all(model.state_dict()[name].equal(value) for name, value in weights.items())


@pytest.mark.parametrize("kind", [Smoothed, SwitchesByEval, OtherGraph])
def test_a_change_of_mode_changes_nothing(kind: type[Smoothed]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, dtype=torch.float32)
    first = gradient(fast, x)
    for mode in (False, True):
        model.train(mode)
        torch.testing.assert_close(gradient(fast, x), first)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_compared_in_eval_mode(kind: type[Smoothed]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.rand(8, 3, 8, 8)
    before = {k: v for k, v in vars(model).items() if not isinstance(v, dict)}
    result = compare(model, x, eps=0.03, repeats=1, progress=False)
    assert not any("random" in note for note in result.notes)
    assert {k: v for k, v in vars(model).items() if not isinstance(v, dict)} == before


class Tables(Smoothed):
    """What eval mode computes of weights, in the ways of LeViT and TinyViT."""

    def __init__(self) -> None:
        super().__init__()
        self.sigma, self.bias = 0.0, nn.Parameter(torch.zeros(5))

    def table(self) -> Tensor:
        return 4 * self.bias.tanh().detach()


class KeepsAnAttribute(Tables):
    kept: Tensor

    def train(self, mode: bool = True) -> "KeepsAnAttribute":
        nn.Module.train(self, mode)
        if mode and "kept" in vars(self):
            del self.kept
        elif not mode:
            self.kept = self.table()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + (self.table() if self.training else self.kept)  # type: ignore[no-any-return]


class SetsNone(KeepsAnAttribute):
    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = None

    def train(self, mode: bool = True) -> "SetsNone":
        nn.Module.train(self, mode)
        self.kept = None if mode else self.table()
        return self


class RegistersABuffer(KeepsAnAttribute):
    def train(self, mode: bool = True) -> "RegistersABuffer":
        nn.Module.train(self, mode)
        if mode and "kept" in self._buffers:
            del self.kept
        elif not mode:
            self.register_buffer("kept", self.table(), persistent=False)
        return self


class WritesABuffer(KeepsAnAttribute):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(5))

    def train(self, mode: bool = True) -> "WritesABuffer":
        nn.Module.train(self, mode)
        if not mode:
            self._buffers["kept"].copy_(self.table())  # type: ignore[union-attr]
        return self


class AnotherGain(Tables):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.tensor(3.0)

    def train(self, mode: bool = True) -> "AnotherGain":
        nn.Module.train(self, mode)
        self.gain = torch.tensor(3.0 if mode else 1.0)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.gain + self.table()  # type: ignore[no-any-return]


class ByEvalAlone(Tables):
    def __init__(self) -> None:
        super().__init__()
        self.gain = 3.0

    def eval(self) -> "ByEvalAlone":
        super().eval()
        self.gain = 1.0
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.gain + self.table()  # type: ignore[no-any-return]


class KeepsNumbers(Tables):
    """No tensor, which would be followed."""

    kept: Any = None

    def train(self, mode: bool = True) -> "KeepsNumbers":
        nn.Module.train(self, mode)
        self.kept = None if mode else self.keep()
        return self

    def keep(self) -> Any:
        return self.table().tolist()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + (self.table() if self.kept is None else torch.as_tensor(self.kept))  # type: ignore[no-any-return]


class KeepsAList(KeepsNumbers):
    def keep(self) -> Any:
        return [self.table()]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + (self.table() if self.kept is None else self.kept[0])  # type: ignore[no-any-return]


TABLES = [
    KeepsAnAttribute,
    SetsNone,
    RegistersABuffer,
    WritesABuffer,
    AnotherGain,
    ByEvalAlone,
    KeepsNumbers,
    KeepsAList,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TABLES)
def test_what_eval_mode_computes_follows_the_weights(kind: type[Tables], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, dtype=dtype)
    near = 1e-4 if dtype == torch.float32 else 0.05
    for value in (0.0, 3.0, -3.0):
        with torch.no_grad():
            model.bias.fill_(value)
        weights = copy.deepcopy(model.state_dict())
        output, wanted = gradient(copy.deepcopy(model).eval(), x)
        for network, within in ((fast, near), (fast.view(full_precision=True), 1e-4)):
            for _ in range(2):
                found, ours = gradient(network, x)
                torch.testing.assert_close(found, output, rtol=within, atol=within)
                assert torch.cosine_similarity(ours.flatten(1), wanted.flatten(1)).min() > 0.98
        with torch.no_grad():
            torch.testing.assert_close(fast(x), output, rtol=1e-4, atol=1e-4)
        assert all(model.state_dict()[name].equal(was) for name, was in weights.items())
        assert model.training
        assert all(part.training for part in model.modules())


class Merged(nn.Module):
    """A convolution and its batch norm in one kernel for eval mode, as RepVGG's blocks."""

    kernel: Tensor | None
    shift: Tensor | None
    norm: Any

    def __init__(self, *, in_buffers: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 5)
        if in_buffers:
            self.register_buffer("kernel", None)
            self.register_buffer("shift", None)
        self.kernel = self.shift = None

    def train(self, mode: bool = True) -> "Merged":
        super().train(mode)
        self.kernel = self.shift = None
        if not mode:
            with torch.no_grad():
                scale = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
                self.kernel = self.conv.weight * scale.view(-1, 1, 1, 1)
                self.shift = self.norm.bias - self.norm.running_mean * scale
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)) if self.kernel is None else F.conv2d(x, self.kernel, self.shift)
        logits: Tensor = self.last(x.relu().mean((2, 3)))
        return logits


class Turned(nn.Module):
    """A product of two weights for eval mode, of which a fast network has but one in half precision."""

    merged: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(192, 16, bias=False), nn.Linear(16, 5)
        self.turn = nn.Parameter(torch.eye(192) + 0.1 * torch.randn(192, 192))

    def train(self, mode: bool = True) -> "Turned":
        super().train(mode)
        with torch.no_grad():
            self.merged = None if mode else self.layer.weight @ self.turn
        return self

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight @ self.turn if self.merged is None else self.merged
        logits: Tensor = self.last(F.linear(x.flatten(1), weight).relu())
        return logits


@pytest.mark.parametrize("auto_update", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: Merged(in_buffers=True), lambda: Merged(in_buffers=False), Turned])
def test_what_eval_mode_computes_is_of_the_models_own_tensors(
    make: Callable[[], nn.Module], dtype: torch.dtype, auto_update: bool
) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.rand(8, 3, 8, 8)
    fast = FastAttackModel(model, dtype=dtype, auto_update=auto_update)
    near = 1e-4 if dtype == torch.float32 else 0.05
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        output = gradient(copy.deepcopy(model).eval(), x)[0]
        torch.testing.assert_close(gradient(fast.update(), x)[0], output, rtol=near, atol=near)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), output, rtol=1e-4, atol=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(3 * x + 1), torch.arange(8) % 5).backward()
            optimizer.step()


class Caches(Tables):
    """A table in a dictionary, a noise in another one, and a hidden part."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}
        self.flags, self.hidden = {"sigma": 0.5}, [nn.Dropout(0.5)]

    def train(self, mode: bool = True) -> "Caches":
        nn.Module.train(self, mode)
        self.flags["sigma"] = 0.5 if mode else 0.0
        self.hidden[0].train(mode)
        if mode:
            self.cache.clear()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.net(x) + self.table()  # type: ignore[no-any-return]
        if "table" not in self.cache:
            self.cache["table"] = self.table()
        output: Tensor = self.net(x + self.flags["sigma"]) + self.cache["table"]
        return output


def test_an_evaluation_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model, x = Caches().train(), torch.rand(16, 3, 8, 8)
    for value in (0.0, 3.0):
        with torch.no_grad():
            model.bias.copy_(value * torch.arange(5.0))
        y = copy.deepcopy(model).eval()(x).argmax(1)
        report = evaluate(model, (x, y), "quick", eps=1e-5, progress=False)
        assert report.clean_accuracy == 1
        compare(model, x, y, eps=0.03, repeats=1, progress=False)
        assert (model.flags, model.cache, model.hidden[0].training) == ({"sigma": 0.5}, {}, True)
        assert all(part.training for part in model.modules())
