"""Functions in the model that are compiled: as in the plain model, and nothing of ours with them."""

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from tests.support.tools import cosine, input_gradient

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from inside torch.compile


def blend(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.sigmoid(x @ weight) * torch.tanh(x @ bias) + x


gate: Any = torch.compile(blend, backend="eager", fullgraph=True)
library: Any = types.ModuleType("library")
library.gate = gate


class Gated(nn.Module):
    """Names operators that are routed, and has weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.head = nn.Linear(6, 5)

    def gate(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.softmax(self.gate(x), -1))
        return logits


class ByAGlobal(Gated):
    def gate(self, x: Tensor) -> Tensor:
        out: Tensor = gate(x, self.weight, self.bias)
        return out


class ByAnotherFile(Gated):
    def gate(self, x: Tensor) -> Tensor:
        out: Tensor = library.gate(x, self.weight, self.bias)
        return out


class ByADecorator(Gated):
    @torch.compile(backend="eager", fullgraph=True)
    def gate(self, x: Tensor) -> Tensor:
        return blend(x, self.weight, self.bias)


class ByAnAttribute(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.run = gate

    def gate(self, x: Tensor) -> Tensor:
        out: Tensor = self.run(x, self.weight, self.bias)
        return out


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.shift = ByAGlobal(), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.body(x) + self.shift.tanh(), -1)


@pytest.mark.parametrize("kind", [ByAGlobal, ByAnotherFile, ByADecorator, ByAnAttribute, Inside])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functions_are_compiled_as_they_are(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x, y = kind().eval(), torch.rand(4, 6), torch.arange(4)
    wanted = input_gradient(model, x, y)
    torch._dynamo.reset()
    counters.clear()
    fast = FastAttackModel(model, dtype=dtype, decisions="fast")
    for _ in range(2):
        assert cosine(input_gradient(fast, x, y), wanted).min() > 0.99
    operators = counters["stats"]["calls_captured"] / counters["stats"]["unique_graphs"]
    assert operators == 6, "those of the function, and none of what keeps results or routes operators"
    assert not counters["graph_break"]
    assert fast._networks.precision.dtype == dtype
