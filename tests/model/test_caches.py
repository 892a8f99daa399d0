"""What a pass leaves in a model's attributes is that pass's: an update takes it back in all copies."""

import copy
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from tests.support.engines import use_engine


class Table(nn.Module):
    """A table computed from weights, for eval mode kept until the next change of mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))
        self.more = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(20))  # too many parts to keep what it computes

    def forward(self, x: Tensor) -> Tensor:
        table = self.table() if self.training else self.kept()
        return self.more[0](x + table[:, None, None])  # type: ignore[no-any-return]

    def table(self) -> Tensor:
        return 4 * self.bias.tanh()

    def kept(self) -> Tensor:
        raise NotImplementedError


class InADictionary(Table):
    """As timm's LeViT, TinyViT and EfficientFormer have it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "InADictionary":
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def kept(self) -> Tensor:
        if "table" not in self.cache:
            self.cache["table"] = self.table()
        return self.cache["table"]


class InAList(Table):
    def __init__(self) -> None:
        super().__init__()
        self.cache: Any = []

    def kept(self) -> Tensor:
        if not self.cache:
            self.cache.append(self.table())
        found: Tensor = self.cache[0]
        return found


class InAQueue(InAList):
    def __init__(self) -> None:
        super().__init__()
        self.cache = deque(maxlen=3)


class InADataObject(Table):
    def __init__(self) -> None:
        super().__init__()
        self.state = SimpleNamespace(table=None)

    def kept(self) -> Tensor:
        if self.state.table is None:
            self.state.table = self.table()
        found: Tensor = self.state.table
        return found


class InANewAttribute(Table):
    def kept(self) -> Tensor:
        if not hasattr(self, "_table"):
            self._table = self.table()
        return self._table


class InAnAttribute(Table):
    def __init__(self) -> None:
        super().__init__()
        self._table: Tensor | None = None

    def kept(self) -> Tensor:
        if self._table is None:
            self._table = self.table()
        return self._table


class InABuffer(Table):
    kept_table: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept_table", None)

    def kept(self) -> Tensor:
        if self.kept_table is None:
            self.kept_table = self.table().detach()
        return self.kept_table


class InANewBuffer(Table):
    def kept(self) -> Tensor:
        if "kept_table" not in self._buffers:
            self.register_buffer("kept_table", self.table().detach())
        return self._buffers["kept_table"]  # type: ignore[return-value]


class BehindAFlag(Table):
    def __init__(self) -> None:
        super().__init__()
        self.is_there, self.tables = False, [torch.zeros(8)]

    def kept(self) -> Tensor:
        if not self.is_there:
            self.is_there, self.tables[0] = True, self.table().detach()
        return self.tables[0]


KINDS = [
    InADictionary, InAList, InAQueue, InADataObject, InANewAttribute, InAnAttribute, InABuffer, InANewBuffer,
    BehindAFlag,
]  # fmt: skip


def gradient(network: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    output = network(leaf)
    (found,) = torch.autograd.grad(output.square().sum(), leaf)
    return output.detach(), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_kept_of_old_weights_is_forgotten(kind: type[Table], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), kind(), nn.Flatten(), nn.Linear(288, 5))
    fast, x = FastAttackModel(model, dtype=dtype), torch.rand(4, 3, 8, 8)
    full, exact = fast.view(full_precision=True), fast.view(decisions="exact")
    near, nearer = 0.05 if dtype == torch.bfloat16 else 1e-4, 1e-4
    for value in (0.0, 3.0, -3.0):
        with torch.no_grad():
            model[2].bias.fill_(value)  # type: ignore[operator]
        plain = copy.deepcopy(model).eval()
        output, wanted = gradient(plain, x)
        for network, bounds in ((full, nearer), (fast, near)):
            for _ in range(2):
                found, grad = gradient(network, x)
                torch.testing.assert_close(found, output, rtol=bounds, atol=bounds)
                assert torch.cosine_similarity(grad.flatten(1), wanted.flatten(1)).min() > 0.99
        with torch.no_grad():
            torch.testing.assert_close(fast(x), output, rtol=nearer, atol=nearer)
            torch.testing.assert_close(exact(x), output, rtol=nearer, atol=nearer)


@pytest.mark.parametrize("kind", [InADictionary, InADataObject])
def test_a_network_that_is_made_after_a_pass_of_the_twin_keeps_nothing_of_it(kind: type[Table]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), kind()), torch.rand(4, 3, 8, 8)
    model.append(nn.Flatten()).append(nn.Linear(288, 5))
    fast = FastAttackModel(model, dtype=torch.bfloat16, auto_update=False)
    for value in (0.0, 3.0):
        with torch.no_grad():
            model[2].bias.fill_(value)  # type: ignore[operator]
            for network in (fast.update().view(decisions="exact"), fast):
                torch.testing.assert_close(network(x), copy.deepcopy(model).eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recording_reads_none_of_old_weights(kind: type[Table], monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, "cudagraph")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), kind(), nn.Flatten(), nn.Linear(288, 5)).eval()
    fast, x = FastAttackModel(model, dtype=torch.float32), torch.rand(4, 3, 8, 8)
    for value in (0.0, 3.0, -3.0):
        with torch.no_grad():
            model[1].bias.fill_(value)  # type: ignore[operator]
        wanted = gradient(copy.deepcopy(model), x)
        for _ in range(4):
            torch.testing.assert_close(gradient(fast, x), wanted, rtol=1e-3, atol=1e-4)


class CastsOnce(nn.Module):
    """A bank of prototypes, or a state, that the first pass replaces in its container."""

    def __init__(self, container: Any, place: Any) -> None:
        super().__init__()
        self.net, self.bank, self.place = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), container, place

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        self.bank[self.place] = self.bank[self.place].to(h.dtype) + 0
        return h * self.bank[self.place]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("make", "place"), [(lambda t: {"p": t}, "p"), (lambda t: [t], 0)], ids=["dict", "list"])
def test_a_tensor_that_a_pass_has_replaced_is_followed(make: Any, place: Any) -> None:
    torch.manual_seed(0)
    model, x = CastsOnce(make(torch.ones(1)), place).eval(), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, dtype=torch.float32, auto_update=False)
    for value in (1.0, 3.0, -2.0):
        model.bank = make(model.bank[place])
        model.bank[place].copy_(torch.tensor([value]))
        fast.update()
        torch.testing.assert_close(gradient(fast, x), gradient(copy.deepcopy(model), x), rtol=1e-4, atol=1e-5)
