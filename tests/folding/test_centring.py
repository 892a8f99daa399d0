"""Streams with a large mean: what is centred, what is not, and that it is the same function."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.folding import Folded, build_fast, trace
from fastadv_adapters.modules import Precision
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


def in_float64(model: nn.Module) -> Folded:
    """The network that half precision would run, in full precision, where nothing hides what is wrong with it."""
    return build_fast(model.double(), trace(model), Precision(torch.device("cpu"), torch.float64, channels_last=False))


def computes_the_same(folded: Folded, model: nn.Module) -> None:
    x = images().double()
    with folded.balanced():
        found = input_gradient(folded.network, x, CLASSES)
        torch.testing.assert_close(folded.network(x), model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, input_gradient(model, x, CLASSES), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_centred_stream_is_the_same_function(dtype: torch.dtype, bias: bool) -> None:
    model, x = Stream(bias=bias), images()
    exact = copy.deepcopy(model)
    computes_the_same(in_float64(exact), exact)
    fast = FastAttackModel(model, dtype=dtype, engine="eager")
    found = input_gradient(fast, x, CLASSES)
    assert fast._networks.folded.centred == ["stem", "convolutions.0", "convolutions.1"]
    # The median: weights differ from one PyTorch to the next, and a sample may lie where a ReLU turns.
    least = {torch.bfloat16: 0.97, torch.float16: 0.99}[dtype]
    assert cosine(found, input_gradient(exact, x.double(), CLASSES)).median() > least
    assert fast._networks.fast.precision.dtype == dtype


def test_full_precision_has_digits_enough_for_a_mean() -> None:
    model, x = Stream(), images()
    fast = FastAttackModel(model, dtype=torch.float32)
    assert (cosine(input_gradient(fast, x, CLASSES), input_gradient(model, x, CLASSES)) > 0.9999).all()
    assert fast._networks.folded.centred == []


def test_means_are_followed_in_place() -> None:
    model = Stream()
    folded = in_float64(model)
    addresses = [p.data_ptr() for p in folded.network.parameters()]
    with torch.no_grad():
        for norm in model.norms:
            norm.running_mean.add_(3.0)  # type: ignore[operator]
        model.stem.bias.mul_(1.1)  # type: ignore[union-attr]
        for refresh in folded.refreshes:
            refresh()
    computes_the_same(folded, model)
    assert [p.data_ptr() for p in folded.network.parameters()] == addresses


def hooked(model: Stream) -> None:
    model.stem.register_forward_hook(lambda module, inputs, output: None)


def shared(model: Stream) -> None:
    model.convolutions[1] = model.convolutions[0]


def read(model: Stream) -> None:
    model.norms[1] = nn.Identity()


@pytest.mark.parametrize("spoil", [hooked, shared, read], ids=lambda f: f.__name__)
def test_what_others_see_is_left_alone(spoil: Callable[[Stream], None]) -> None:
    model = Stream()
    spoil(model)
    folded = in_float64(model)
    computes_the_same(folded, model)
    assert "stem" not in folded.centred


def test_a_stream_that_a_relu_reads_too_is_left_alone() -> None:
    model = Stream(leak="relu")
    folded = in_float64(model)
    computes_the_same(folded, model)
    assert folded.centred == []


class Fork(nn.Module):
    """One batch norm reads a layer, another one its sum with a layer that a ReLU reads too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.norms, self.head = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2)), nn.Linear(8, 5)
        for norm in self.norms:
            norm.running_mean.normal_()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.one(x), self.other(x)
        seen = F.silu(self.norms[0](one)) + F.silu(self.norms[1](one + other)) + F.silu(other)
        logits: Tensor = self.head(seen.mean((2, 3)))
        return logits


def test_a_layer_whose_mean_a_batch_norm_would_not_give_back_is_left_alone() -> None:
    model = Fork().eval()
    folded = in_float64(model)
    computes_the_same(folded, model)
    assert folded.centred == []


class Early(nn.Module):
    """Bright images leave early: past the first layer of a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = Stream(1.0)

    def forward(self, x: Tensor) -> Tensor:
        is_easy = x.mean() > 0.7
        logits: Tensor = self.stream.head(F.silu(self.stream.stem(x)).mean((2, 3))) if is_easy else self.stream(x)
        return logits


def test_a_branch_that_calls_a_centred_layer_without_its_batch_norm_undoes_it() -> None:
    model, x = Early(), images()
    fast = FastAttackModel(model, dtype=torch.bfloat16, decisions="fast")
    input_gradient(fast, x, CLASSES)
    assert fast._networks.folded.centred[0] == "stream.stem"
    bright = x / 2 + 0.5
    with pytest.warns(FastAttackWarning, match="not folded into stream.stem, which the model also calls without"):
        found = input_gradient(fast, bright, CLASSES)
    assert cosine(found, input_gradient(model, bright, CLASSES)).min() > 0.99
    assert fast._networks.folded.centred == []
    assert fast._networks.precision.dtype == torch.bfloat16
    torch.testing.assert_close(fast(bright.requires_grad_()), model(bright), rtol=2e-2, atol=2e-2)


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
    folded = in_float64(model)
    computes_the_same(folded, model)
    assert folded.centred == ["second.stem", "second.convolutions.0", "second.convolutions.1"]


def test_a_flag_that_hands_the_stream_out_undoes_it() -> None:
    model, x = Stream(), images()
    fast = FastAttackModel(model, dtype=torch.float16)
    input_gradient(fast, x, CLASSES)
    assert fast._networks.folded.centred
    model.features = True
    torch.testing.assert_close(fast(x.requires_grad_()), model(x), rtol=1e-3, atol=1e-1)
    assert fast._networks.folded.centred == []


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
