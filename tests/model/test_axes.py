"""Images without a batch or a channel axis: which one, and what adds it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, SafePGD, compare, evaluate
from fastadv_adapters.modules import lacking_axis

GREY = torch.rand(6, 8, 8)
COLOUR = torch.rand(3, 8, 8)
LABELS = torch.arange(6)


def net(channels: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)).eval()


def evaluated(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return evaluate(model, (x, y), "safe-pgd-1", eps=0.1, progress=False)


def compared(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return compare(model, x, y, repeats=1, progress=False)


def safely(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return SafePGD(model, eps=0.1, steps=1)(x, y)


def passed(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return FastAttackModel(model)(x)


CALLS = [evaluated, compared, safely, passed]


@pytest.mark.parametrize("call", CALLS)
def test_grey_images_lack_the_channel_axis(call: Callable[..., Any]) -> None:
    text = r"expected images of shape \(N, 1, H, W\), got \(N, 8, 8\): add the channel axis with x\.unsqueeze\(1\)"
    with pytest.raises((ValueError, RuntimeError), match=text):
        call(net(1), GREY, LABELS)
    call(net(1), GREY.unsqueeze(1), LABELS)


@pytest.mark.parametrize("call", CALLS)
def test_one_image_lacks_the_batch_axis(call: Callable[..., Any]) -> None:
    """Its one label tells, or the model does."""
    with pytest.raises((ValueError, RuntimeError), match=r"batch axis .*x\.unsqueeze\(0\)"):
        call(net(3), COLOUR, LABELS[:1])
    call(net(3), COLOUR.unsqueeze(0), LABELS[:1])


def test_the_labels_of_one_image_may_be_left_out() -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Flatten(-2), Last()).eval()
    for model in (net(3), pooled):
        with pytest.raises(ValueError, match=r"images of shape \(N, 3, H, W\), got \(3, 8, 8\): add the batch axis"):
            compare(model, COLOUR, repeats=1, progress=False)


class First(nn.Module):
    """Has a second convolution, which it does not call."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.other = first, nn.Conv1d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.first(x)
        return output


class Last(nn.Module):
    """The mean over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


@pytest.mark.parametrize(
    ("model", "shape", "text"),
    [
        (nn.Conv2d(1, 4, 3), (28, 28, 28), "(N, 1, H, W), got (N, 28, 28): add the channel axis with x.unsqueeze(1)"),
        (nn.Conv1d(2, 4, 3), (2, 9), "(N, 2, L), got (2, 9): add the batch axis with x.unsqueeze(0)"),
        (nn.Conv3d(1, 4, 3), (5, 9, 9, 9), "(N, 1, D, H, W), got (N, 9, 9, 9): add the channel axis"),
        (
            nn.Conv2d(3, 4, 3),
            (6, 9, 9),
            "(N, 3, H, W), got (N, 9, 9): add the channel axis with x.unsqueeze(1).repeat(1, 3, 1, 1)",
        ),
        (nn.Conv2d(3, 4, 3).double(), (3, 9, 9), "(N, 3, H, W), got (3, 9, 9): add the batch axis with x.unsqueeze(0)"),
        (nn.Conv2d(1, 4, 12), (6, 9, 9), ""),
        (nn.Conv2d(3, 4, 3), (6, 3, 9, 9), ""),
        (nn.Conv2d(3, 4, 3), (6, 9), ""),
        (nn.Linear(9, 4), (6, 9, 9), ""),
    ],
)
def test_the_first_convolution_tells(model: nn.Module, shape: tuple[int, ...], text: str) -> None:
    found = lacking_axis(First(model), [torch.rand(shape)])
    if isinstance(model, nn.Linear):
        found = lacking_axis(model, [torch.rand(shape)])
    assert (found or "").startswith(text)
    assert bool(found) == bool(text)


class Tokens(nn.Module):
    """Takes tokens (N, L, 12), and has a convolution inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(12, 16), nn.Conv2d(16, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x).transpose(1, 2).unflatten(2, (4, 4))
        logits: Tensor = self.head(self.mix(z).mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("model", "fit", "unfit"),
    [
        (nn.Sequential(nn.Unflatten(1, (1, 8)), net(1)), (6, 8, 8), (6, 8, 9)),
        (Tokens().eval(), (6, 16, 12), (6, 15, 12)),
        (Tokens().eval(), (16, 16, 12), (16, 16, 13)),
    ],
)
def test_a_model_that_adds_the_axis_is_left_alone(
    model: nn.Module, fit: tuple[int, ...], unfit: tuple[int, ...]
) -> None:
    """Also if it fails for another reason."""
    evaluated(model, torch.rand(fit), torch.arange(fit[0]) % 10)
    assert passed(model, torch.rand(fit), LABELS).shape == (fit[0], 10)
    with pytest.raises(RuntimeError, match="refused an input of shape") as found:
        passed(model, torch.rand(unfit), LABELS)
    assert "expected images" not in str(found.value)


def test_looking_for_the_axis_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), Noisy(), Counting())
    state, before = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    assert lacking_axis(model, [GREY]) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(part.training for part in model.modules())
    assert model[-1].calls == []


class Clamping(nn.Module):
    """Writes into its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        with torch.no_grad():
            self.conv.weight.fill_(9)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.conv.weight.clamp_(-1, 1)
        out: Tensor = self.conv(x).mean((2, 3))
        return out


def test_looking_for_the_axis_writes_into_no_weight() -> None:
    model = Clamping()
    assert lacking_axis(model, [GREY]) is not None
    assert bool((model.conv.weight == 9).all())


class Noisy(nn.Module):
    """Draws random numbers in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Counting(nn.Module):
    """Notes its calls."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls.append(len(x))
        return x
