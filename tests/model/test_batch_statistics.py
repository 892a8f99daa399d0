"""A model that is attacked as it is trained: batch norm by the statistics of the batch."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, with_batch_statistics
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
