"""Mixtures of experts: which layers are met, and how often, depends on the samples."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.boundary.ends import Ends, with_siblings
from tests.support.tools import cosine, input_gradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


class TopOne(nn.Module):
    """Each sample is sent to one expert, by its first pixel."""

    def __init__(self, experts: int = 5, *, bare: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU())
        self.experts = nn.ModuleList(nn.Linear(32, 10) if bare else expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        features, sent_to = self.body(x), (x[:, 0, 0, 0] * len(self.experts)).long()
        weight = features.square().mean(1, keepdim=True).sigmoid().float()
        out = torch.zeros(len(x), 10)
        for number, one in enumerate(self.experts):
            index = (sent_to == number).nonzero().flatten()
            if len(index):
                out = out.index_add(0, index, one(features[index]).float() * weight[index])
        return out


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [1, 2, 4, 10, 40])
def test_experts_that_the_self_check_has_not_met(samples: int, dtype: torch.dtype, *, bare: bool) -> None:
    model = TopOne(bare=bare).eval()
    fast = FastAttackModel(model, dtype=dtype)
    for seed in range(6):
        x = torch.rand(samples, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        y = torch.arange(samples) % 10
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = input_gradient(fast, x, y)
        near = cosine(found, input_gradient(model, x, y))
        assert near.median() > 0.99
        assert near.min() > 0.8, "a ReLU may flip on rounding"
    assert fast.dtype == dtype


class OneOfTwoHeads(nn.Module):
    """Adds a head with a name of its own for bright images, on a path that the self-check has not met."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU())
        self.head, self.other = nn.Linear(32, 10), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        logits: Tensor = self.head(features).float().sigmoid()
        return logits + self.other(features).float() if bool(x[0, 0, 0, 0] > 0.5) else logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_that_the_self_check_has_not_met(dtype: torch.dtype) -> None:
    model, x = OneOfTwoHeads().eval(), torch.rand(12, 3, 8, 8)
    fast, y = FastAttackModel(model, dtype=dtype), torch.arange(12) % 10
    for value in (0.2, 0.8, 0.2):
        x[0, 0, 0, 0] = value
        assert (cosine(input_gradient(fast, x, y), input_gradient(model, x, y)) > 0.8).all()


def test_siblings_are_layers_that_stand_in_the_same_place_and_were_not_called() -> None:
    network = TopOne(3)
    called = ["body.1", "experts.0.0", "experts.0.2"]
    found = with_siblings(Ends(frozenset({"experts.0.2"}), 1), network, called)
    assert found.layers == {"experts.0.2", "experts.1.2", "experts.2.2"}
    assert not found.upper
