"""Streams with a large mean: what is centred, what is not, and that it is the same function."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from tests.support.tools import cosine, input_gradient

CLASSES = torch.arange(16) % 5


class Stream(nn.Module):
    """Blocks with batch norm in front, on a stream whose mean is large."""

    def __init__(self, mean: float = 30.0, *, bias: bool = True, leak: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=bias) for _ in range(2))
        self.drop, self.head, self.leak, self.features = nn.Dropout(0.5), nn.Linear(8, 5), leak, False
        with torch.no_grad():
            self.stem.weight.add_(mean / 14)
            if self.stem.bias is not None:
                self.stem.bias.fill_(mean)
        self.train()
        for norm in self.norms:
            norm.momentum = None  # type: ignore[assignment]
        self(torch.rand(64, 3, 6, 6))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, convolution in zip(self.norms, self.convolutions, strict=False):
            x = self.drop(x + convolution(F.relu(norm(x))))
        if self.features:
            return x.flatten(1)
        seen = F.relu(self.norms[-1](x))
        if self.leak == "relu":
            seen = seen + F.relu(x)
        logits: Tensor = self.head(seen.mean((2, 3)))
        return logits


def images() -> Tensor:
    return torch.rand(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_centred_stream_is_the_same_function(dtype: torch.dtype, bias: bool) -> None:
    model, x = Stream(bias=bias), images()
    exact = copy.deepcopy(model).double()
    source = exact if dtype == torch.float64 else model
    fast = FastAttackModel(source, dtype=dtype, engine="eager")
    found = input_gradient(fast, x.to(next(source.parameters()).dtype), CLASSES)
    assert fast._networks.folded.centred == ["stem", "convolutions.0", "convolutions.1"]
    least = {torch.bfloat16: 0.97, torch.float16: 0.99}.get(dtype, 0.999999)
    # The median: weights differ from one PyTorch to the next, and a sample may lie where a ReLU turns.
    assert cosine(found, input_gradient(exact, x.double(), CLASSES)).median() > least
    assert fast._networks.fast.precision.dtype == dtype


def test_means_are_followed_in_place() -> None:
    model, x = Stream(), images()
    fast = FastAttackModel(model, dtype=torch.float32)
    input_gradient(fast, x, CLASSES)
    addresses = [p.data_ptr() for p in fast._networks.folded.network.parameters()]
    with torch.no_grad():
        for norm in model.norms:
            norm.running_mean.add_(3.0)  # type: ignore[operator]
        model.stem.bias.mul_(1.1)  # type: ignore[union-attr]
    found = input_gradient(fast, x, CLASSES)
    assert (cosine(found, input_gradient(model, x, CLASSES)) > 0.9999).all()
    assert [p.data_ptr() for p in fast._networks.folded.network.parameters()] == addresses


def hooked(model: Stream) -> None:
    model.stem.register_forward_hook(lambda module, inputs, output: None)


def shared(model: Stream) -> None:
    model.convolutions[1] = model.convolutions[0]


def read(model: Stream) -> None:
    model.norms[1] = nn.Identity()


@pytest.mark.parametrize("spoil", [hooked, shared, read], ids=lambda f: f.__name__)
def test_what_others_see_is_left_alone(spoil: Callable[[Stream], None]) -> None:
    model, x = Stream(), images()
    spoil(model)
    fast = FastAttackModel(model, dtype=torch.float32)
    assert (cosine(input_gradient(fast, x, CLASSES), input_gradient(model, x, CLASSES)) > 0.9999).all()
    assert "stem" not in fast._networks.folded.centred


def test_a_stream_that_a_relu_reads_too_is_left_alone() -> None:
    model, x = Stream(leak="relu"), images()
    fast = FastAttackModel(model, dtype=torch.float32)
    assert (cosine(input_gradient(fast, x, CLASSES), input_gradient(model, x, CLASSES)) > 0.9999).all()
    assert fast._networks.folded.centred == []


def test_a_stream_that_a_convolution_reads_too_is_left_alone_and_what_that_writes_is_not() -> None:
    class Stages(nn.Module):
        """The second stage begins with a convolution of the stream itself."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            self.first, self.second = Stream(), Stream()
            torch.manual_seed(seed)
            self.second.stem = nn.Conv2d(8, 8, 1)
            self.second.norms[0].running_mean.copy_(self.first.norms[0].running_mean)  # type: ignore[operator,arg-type]

        def forward(self, x: Tensor) -> Tensor:
            x = self.first.stem(x)
            x = x + self.first.convolutions[0](F.relu(self.first.norms[0](x)))
            logits: Tensor = self.second(x)
            return logits

    x = images()
    models = (Stages(seed).eval() for seed in range(20))  # in many all of the last ReLU is off
    model = next(model for model in models if input_gradient(model, x, CLASSES).flatten(1).any(1).all())
    fast = FastAttackModel(model, dtype=torch.float32)
    assert (cosine(input_gradient(fast, x, CLASSES), input_gradient(model, x, CLASSES)) > 0.9999).all()
    assert fast._networks.folded.centred == ["second.stem", "second.convolutions.0", "second.convolutions.1"]


def test_a_flag_that_hands_the_stream_out_undoes_it() -> None:
    model, x = Stream(), images()
    fast = FastAttackModel(model, dtype=torch.float32)
    assert (cosine(input_gradient(fast, x, CLASSES), input_gradient(model, x, CLASSES)) > 0.9999).all()
    model.features = True
    torch.testing.assert_close(fast(x.requires_grad_()), model(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_half_precision_rounds_of_a_bias_is_made_good(dtype: torch.dtype) -> None:
    model: Any = Stream(30.3)
    with torch.no_grad():
        model.stem.bias.uniform_(20, 40)
    fast: Any = FastAttackModel(model, dtype=dtype, engine="eager")
    network, writers = fast._networks.folded.network, ["stem", "convolutions.0", "convolutions.1"]
    for count, norm in enumerate(model.norms, start=1):
        given, own = (sum(of.get_submodule(name).bias.double() for name in writers[:count]) for of in (model, network))
        scale, shift = (t.double() for t in vars(network.get_submodule(f"norms.{count - 1}"))["scale_and_shift"][dtype])
        by = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        wanted = by * (given - norm.running_mean.double()) + norm.bias.double()
        # The shift is rounded to 16 bits, too, but is no larger than what is left of the mean.
        rounding = torch.finfo(dtype).eps * (shift.abs() + (by * own).abs() + 1e-2)
        assert bool(((scale * own + shift - wanted).abs() <= rounding).all())
