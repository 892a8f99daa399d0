"""EAD and JSMA amplify small differences of gradients: by default they run in full precision, as on plain models."""

from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from torch import Tensor

from fastadv_adapters import FastAttackModel
from fastadv_adapters.foolbox import FastPyTorchModel
from fastadv_adapters.foolbox import accelerate as accelerate_foolbox
from fastadv_adapters.torchattacks import accelerate
from tests.support.tools import attackable_net

DTYPES = [torch.bfloat16, torch.float16]


def task() -> tuple[Any, Tensor, Tensor]:
    net = attackable_net()
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("way", ["model", "accelerate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_foolbox_ead_is_the_plain_one(dtype: torch.dtype, way: str) -> None:
    net, x, y = task()
    attack = foolbox.attacks.EADAttack(binary_search_steps=2, steps=20)
    plain = foolbox.PyTorchModel(net, bounds=(0, 1))
    wanted = attack(plain, x, y, epsilons=None)[0]
    if way == "model":
        found = attack(FastPyTorchModel(net, bounds=(0, 1), dtype=dtype), x, y, epsilons=None)[0]
    else:
        found = accelerate_foolbox(attack, dtype=dtype)(plain, x, y, epsilons=None)[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", [torchattacks.EADL1, torchattacks.EADEN, torchattacks.JSMA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchattacks_ead_and_jsma_take_gradients_from_the_twin(dtype: torch.dtype, kind: Any) -> None:
    net, x, y = task()
    settings: Any = {"gamma": 0.02} if kind is torchattacks.JSMA else {"binary_search_steps": 1, "max_iterations": 10}
    fast = FastAttackModel(net, dtype=dtype)
    kind(fast, **settings)(x, y)
    accelerated = accelerate(kind(net, **settings), dtype=dtype)
    accelerated(x, y)
    assert accelerated.model._full_precision
    assert all(kind.schedule.passes is None for kind in fast._networks.kinds.values()), (
        "no pass was one in half precision"
    )
    asked = accelerate(kind(net, **settings), dtype=dtype, decisions="fast")
    assert not asked.model._full_precision
