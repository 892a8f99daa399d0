"""A copy that does not compute what the wrapped model computes is an error, and the model is left as it was."""

import itertools
import random
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from tests.support.tools import cosine, fingerprint, input_gradient, small_net

FLOAT32: Any = {"dtype": torch.float32}


class Kind:
    """A marker with a number, which is copied."""

    def __init__(self) -> None:
        self.number = 0


TRAINED = Kind()
BESIDE: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()
KEPT: dict[str, Tensor] = {}


class Net(nn.Module):
    """Two layers; what is between them is for subclasses to say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        logits: Tensor = self.last(self.between(self.first(x.flatten(1))))
        return logits

    def between(self, hidden: Tensor) -> Tensor:
        return hidden.relu()


class Marked(Net):
    """Compares a marker by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = TRAINED

    def between(self, hidden: Tensor) -> Tensor:
        return hidden.relu() if self.kind is TRAINED else hidden.sign()


class Turned(Marked):
    """The copy has the same values, and other gradients."""

    def between(self, hidden: Tensor) -> Tensor:
        return hidden.relu() if self.kind is TRAINED else hidden.relu().detach() + (hidden - hidden.detach())


class Beside(Net):
    """Keeps a number beside the instance."""

    def __init__(self) -> None:
        super().__init__()
        BESIDE[self] = 2.0

    def between(self, hidden: Tensor) -> Tensor:
        return hidden.relu() * BESIDE[self]


class Supervised(Net):
    """Returns what a hook has put into a dictionary of the file, which the model holds, too."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = KEPT
        self.first.register_forward_hook(keep)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + self.kept["first"].mean(1, keepdim=True)


def keep(_: nn.Module, __: Any, output: Tensor) -> None:
    KEPT["first"] = output


def images() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("kind", "told"),
    [(Marked, "outputs differ"), (Turned, "gradients differ"), (Beside, "raised KeyError"), (Supervised, "a copy")],
)
def test_a_copy_that_computes_something_else_is_an_error(kind: Any, told: str, mode: bool) -> None:
    model, (x, y) = kind().train(mode), images()
    model(x)
    fast, before = FastAttackModel(model, **FLOAT32), fingerprint(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"expected a model whose copies compute what it computes.*{told}"):
            input_gradient(fast, x, y)
    assert fingerprint(model) == before
    assert [part.training for part in model.modules()] == [mode] * 3
    assert all(p.grad is None for p in model.parameters())


class Counts(Net):
    """Counts its passes in a number, a list and a tensor, and asks for gradients of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.seen = 0, list[Tensor]()

    def between(self, hidden: Tensor) -> Tensor:
        self.passes += 1
        self.seen.append(hidden)
        with torch.enable_grad():
            self.first.weight.sum().backward()
        return hidden.relu() * (1 + self.passes)


@pytest.mark.filterwarnings("ignore")
def test_the_model_is_left_as_it_was() -> None:
    model, (x, y) = Counts().train(), images()
    model.first.weight.grad = grad = torch.ones_like(model.first.weight)
    fast, state = FastAttackModel(model, **FLOAT32), (torch.get_rng_state(), random.getstate())
    versions = [p._version for p in model.parameters()]
    input_gradient(fast, x, y)
    assert model.training
    assert (model.passes, model.seen) == (0, [])
    assert model.first.weight.grad is grad
    assert (grad == 1).all()
    assert [p._version for p in model.parameters()] == versions
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()


class Writes(Net):
    """Counts its passes in a buffer."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def between(self, hidden: Tensor) -> Tensor:
        self.count += 1
        return hidden.relu()


class WritesUnseen(Writes):
    """The same, unseen by PyTorch."""

    def between(self, hidden: Tensor) -> Tensor:
        self.count.data.add_(1)
        self.last.weight.data.mul_(0.5)
        return hidden.relu()


class Iterates(Net):
    """Computes something else in each pass, which no seed controls."""

    turns = itertools.count()

    def between(self, hidden: Tensor) -> Tensor:
        return hidden.relu() * (1 + next(self.turns) % 3)


class OwnEval(Net):
    """Its own ``train()`` switches an attribute; flags may say that it is in eval mode, and the attribute not."""

    def __init__(self) -> None:
        super().__init__()
        self.noisy = True

    def train(self, mode: bool = True) -> "OwnEval":
        self.noisy = mode
        return super().train(mode)

    def between(self, hidden: Tensor) -> Tensor:
        return hidden.relu() + hidden.sin() * self.noisy


def in_eval_by_flags(model: nn.Module) -> nn.Module:
    for part in model.modules():
        part.training = False
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [Writes(), WritesUnseen(), Iterates(), in_eval_by_flags(OwnEval()), OwnEval()])
def test_a_model_with_a_state_is_not_compared(model: nn.Module) -> None:
    x, y = images()
    before = fingerprint(model)
    input_gradient(FastAttackModel(model, **FLOAT32), x, y)
    assert fingerprint(model) == before


def test_weights_changed_unseen_and_weights_that_are_not_followed_are_no_error() -> None:
    _, y = images()
    for auto_update in (True, False):
        model = small_net().eval()
        fast = FastAttackModel(model, auto_update=auto_update, **FLOAT32)
        with torch.no_grad():
            for p in model.parameters():
                p.data.mul_(2) if auto_update else p.mul_(2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = input_gradient(fast, torch.rand(8, 3, 8, 8), y)
        assert found.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_input_that_the_model_itself_refuses_is_no_error(dtype: torch.dtype) -> None:
    model, (x, y) = Net().to(dtype).eval(), images()
    with pytest.raises(RuntimeError):
        model(x)
    found = input_gradient(FastAttackModel(model), x, y)
    assert (cosine(found, input_gradient(model.float(), x, y)) > 0.99).all()


def test_nothing_is_kept_alive() -> None:
    model, (x, y) = Net().eval(), images()
    fast = FastAttackModel(model, **FLOAT32)
    input_gradient(fast, x, y)
    gone = weakref.ref(model)
    del model, fast
    assert gone() is None
