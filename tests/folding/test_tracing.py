"""What a trace sees of a forward pass: branches that it does not take, and shapes that Python code asks for."""

from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.folding import trace
from tests.support.tools import batch, settle

FLOAT32: Any = {"dtype": torch.float32}


class Optional(nn.Module):
    """Traces as if the optional input were always given; without it, the layer is read without its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6), nn.Conv1d(6, 3, 1)
        settle(self)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        h = self.layer(x[:, :, None])
        out: Tensor = self.head(h) if extra is None else self.head(self.norm(h)) + extra[:, :, None]
        return out


def test_another_branch_in_a_later_call_is_noticed() -> None:
    net = Optional().eval()
    fast, x = FastAttackModel(net, **FLOAT32), torch.rand(4, 4, requires_grad=True)
    extra = torch.rand(4, 3)
    torch.testing.assert_close(fast(x, extra), net(x, extra))
    with pytest.warns(FastAttackWarning, match="not folded into|folded into 0 layers only"):
        found = fast(x)
    torch.testing.assert_close(found, net(x))
    torch.testing.assert_close(fast(x, extra), net(x, extra))


class Viewing(nn.Module):
    """Flattens as many people do: by ``view`` and ``len``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 10)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.norm(self.conv(x))).view(len(x), -1))
        return out


def test_len_in_a_forward_folds_and_the_warning_points_at_the_callers_line() -> None:
    fast, (x, y) = FastAttackModel(Viewing(), **FLOAT32), batch()
    assert "norm  folded into conv" in fast.summary()
    with pytest.warns(FastAttackWarning, match="contiguous layout") as caught:
        torchattacks.FGSM(fast)(x, y)
    assert caught[0].filename == __file__


class Reads(nn.Module):
    """Calls a convolution that it shares, by its weight."""

    def __init__(self, shared: nn.Conv2d) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.shared.weight, padding=1)


class TwoBranches(nn.Module):
    """Does not trace as a whole: each branch is traced by itself."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 4, 3, padding=1)
        self.calls, self.reads, self.head = nn.Sequential(conv, nn.BatchNorm2d(4)), Reads(conv), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > torch.inf):
            return x
        out: Tensor = self.head((self.calls(x) + self.reads(x)).mean((2, 3)))
        return out


def test_a_weight_that_another_branch_reads_under_another_name_is_not_folded() -> None:
    net = settle(TwoBranches().eval())
    assert trace(net).touched == {"calls.0"}
    fast = FastAttackModel(net, dtype=torch.float32)
    x, _ = batch()
    torch.testing.assert_close(fast(x), net(x))
    assert "the weight of calls.0 is read by other code too" in fast.summary()
