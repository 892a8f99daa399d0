"""A model that is attacked as it is trained: batch norm by the statistics of the batch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, compare, evaluate, with_batch_statistics
from fastadv_adapters.modules import in_eval_mode
from tests.support.tools import batch, cosine, fingerprint, input_gradient, small_net

FLOAT32: Any = {"dtype": torch.float32}
pytestmark = pytest.mark.filterwarnings("ignore:.*#samples-coupled")


def agrees(fast: FastAttackModel, net: nn.Module) -> bool:
    plain = copy.deepcopy(net).train()
    return bool((cosine(input_gradient(fast, *batch(8)), input_gradient(plain, *batch(8))) > 0.999).all())


def test_gradients_are_those_in_training_mode_and_the_model_is_as_before() -> None:
    net = small_net()
    before = fingerprint(net)
    fast = FastAttackModel(with_batch_statistics(net), **FLOAT32)
    assert agrees(fast, net)
    assert fingerprint(net) == before, "running statistics too"
    eval_mode = input_gradient(FastAttackModel(net, **FLOAT32), *batch(8))
    assert (cosine(input_gradient(fast, *batch(8)), eval_mode) < 0.99).any(), "it is another function"


def test_steps_and_loaded_weights_are_followed() -> None:
    net = small_net()
    fast = FastAttackModel(with_batch_statistics(net), **FLOAT32)
    before = input_gradient(fast, *batch(8))
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    F.cross_entropy(net.train()(batch(8)[0]), batch(8)[1]).backward()
    optimizer.step()
    assert agrees(fast, net)
    assert (cosine(input_gradient(fast, *batch(8)), before) < 0.999).any(), "the step must be seen"
    net.load_state_dict(small_net(seed=5).state_dict())
    assert agrees(fast, net)


def test_all_but_batch_norm_is_as_in_eval_mode() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Dropout(0.5)).train()
    x, _ = batch(4)
    assert torch.equal(with_batch_statistics(net)(x), copy.deepcopy(net).eval()(x))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        with_batch_statistics(lambda x: x)  # type: ignore[arg-type]


class Noisy(nn.Module):
    """Its ``train()`` writes into a buffer, a tensor in an attribute, and one in a dictionary."""

    noise: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale, self.more = small_net(), torch.tensor(0.5), {"shift": torch.tensor(0.5)}
        self.register_buffer("noise", torch.tensor(0.5))

    def train(self, mode: bool = True) -> "Noisy":
        super().train(mode)
        for tensor in self.written():
            tensor.fill_(0.5 if mode else 0.0)
        return self

    def written(self) -> list[Tensor]:
        return [self.noise, self.scale, self.more["shift"]]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x + sum(self.written()) * torch.randn_like(x))
        return out


def use_batch_statistics(model: nn.Module) -> None:
    assert agrees(FastAttackModel(with_batch_statistics(model), **FLOAT32), model.net)  # type: ignore[arg-type]


def be_evaluated(model: nn.Module) -> None:
    evaluate(model, batch(8), "safe-pgd-ce-1", eps=0.03, progress=False)


def be_compared(model: nn.Module) -> None:
    compare(model, *batch(8), eps=0.03, repeats=1, progress=False)


def be_lent(model: nn.Module) -> None:
    with in_eval_mode(model):
        assert not any(model.written())  # type: ignore[operator]


@pytest.mark.parametrize("use", [use_batch_statistics, be_evaluated, be_compared, be_lent])
def test_what_a_models_own_switch_writes_into_is_as_before(use: Callable[[nn.Module], None]) -> None:
    model = Noisy().train()
    use(model)
    assert [float(t) for t in model.written()] == [0.5] * 3
    assert all(part.training for part in model.modules())


def test_what_code_has_put_on_a_weight_stays() -> None:
    net, settings = small_net(), {"bits": [8]}
    weight: Any = next(net.parameters())
    weight.settings = settings
    with_batch_statistics(net)
    assert weight.settings is settings
    assert settings == {"bits": [8]}
