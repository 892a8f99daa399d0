"""Samples that see each other in larger batches only: a few of them do not show it."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning
from tests.support.tools import cosine

SAMPLES = 32


def normed(h: Tensor) -> Tensor:
    return (h - h.mean(0)) / (h.std(0, unbiased=False) + 0.1)


class OfParts(nn.Module):
    """Ghost batch norm: each of four parts of the batch has statistics of its own."""

    passes = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        OfParts.passes += 1
        return self.second(self.norm(self.first(x)).relu())  # type: ignore[no-any-return]

    def norm(self, h: Tensor) -> Tensor:
        return torch.cat([normed(part) for part in h.chunk(4)])


class IfLargeEnough(OfParts):
    """Statistics of the batch if it has so many samples."""

    def norm(self, h: Tensor) -> Tensor:
        return normed(h) if len(h) >= 16 else h


class Apart(OfParts):
    """No statistics."""

    def norm(self, h: Tensor) -> Tensor:
        return h


def gradient(model: nn.Module, samples: int = SAMPLES) -> Tensor:
    """Of some samples the model is far surer than of others."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(samples, 12, generator=generator).requires_grad_()
    sure = 10.0 ** -(torch.arange(samples) % 5)
    losses = F.cross_entropy(model(x), torch.arange(samples) % 10, reduction="none")
    return torch.autograd.grad((losses * sure).sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [OfParts, IfLargeEnough])
def test_gradients_are_right_in_all_passes(kind: type[OfParts], dtype: torch.dtype) -> None:
    model = kind().eval()
    fast = FastAttackModel(model, dtype=dtype)
    with pytest.warns(FastAttackWarning, match="samples-coupled"):
        first = gradient(fast)
    for found in (first, gradient(fast), gradient(fast)):
        assert cosine(found, gradient(model)).mean() > 0.99


def test_a_batch_twice_as_large_is_looked_at_again_and_told_of_once() -> None:
    model = IfLargeEnough().eval()
    fast = FastAttackModel(model, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(gradient(fast, 8), gradient(model, 8))
    with pytest.warns(FastAttackWarning, match="samples-coupled"):
        gradient(fast, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(gradient(fast, 64), gradient(model, 64))


def test_later_passes_run_the_model_once() -> None:
    fast = FastAttackModel(Apart().eval(), dtype=torch.float32, engine="eager")
    gradient(fast)
    for samples in (SAMPLES, SAMPLES // 2, 2 * SAMPLES - 1):
        OfParts.passes = 0
        gradient(fast, samples)
        assert OfParts.passes == 1


def test_a_look_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bool:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("fastadv_adapters.networks.whole.reach_others", full)
    model = Apart().eval()
    torch.testing.assert_close(gradient(FastAttackModel(model, dtype=torch.float32)), gradient(model))
