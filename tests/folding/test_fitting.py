"""Layers that cannot hold the batch norm behind them: for what they are, or for what they are called with."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.networks import selfcheck
from tests.support.tools import cosine, input_gradient, settle

FLOAT32: Any = {"dtype": torch.float32}
LABELS = torch.arange(4) % 3


def behind(layer: nn.Module, norm: nn.Module, features: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(layer, norm, nn.ReLU(), nn.Flatten(), nn.Linear(features, 3)).eval()


def held_as(layer: nn.Module, name: str, way: str) -> nn.Module:
    """A layer with a tensor that is no parameter."""
    tensor = getattr(layer, name).detach()
    delattr(layer, name)
    if way == "buffer":
        layer.register_buffer(name, tensor)
    else:
        setattr(layer, name, tensor)
    return layer


LAYERS: dict[str, Any] = {
    "convolution": (lambda: nn.Conv2d(3, 8, 3), nn.BatchNorm2d, (4, 3, 6, 6), 128),
    "transposed": (lambda: nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d, (4, 3, 6, 6), 512),
    "linear": (lambda: nn.Linear(12, 8), nn.BatchNorm1d, (4, 12), 8),
}


def assert_alike(model: nn.Module, fast: nn.Module, x: Tensor) -> None:
    assert (cosine(input_gradient(fast, x, LABELS), input_gradient(model, x, LABELS)) > 0.9999).all()
    torch.testing.assert_close(fast(x.clone().requires_grad_()), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["buffer", "attribute"])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_whose_tensors_are_no_parameters_are_not_folded(kind: str, name: str, way: str) -> None:
    make, norm, shape, features = LAYERS[kind]
    layer = held_as(make(), name, way)
    model, x = behind(layer, norm(8), features), torch.rand(shape)
    settle(model)
    fast = FastAttackModel(model, **FLOAT32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_alike(model, fast, x)
    assert "the weight or the bias of 0 is no parameter" in str(fast.summary())
    with torch.no_grad():
        getattr(layer, name).mul_(1.5)
    assert_alike(model, fast, x)


class Stream(nn.Module):
    """A sum of convolutions that batch norms alone read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.inner, self.outer, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y + self.second(self.inner(y).relu())
        logits: Tensor = self.last(self.outer(y).relu().mean((2, 3)))
        return logits


@pytest.mark.parametrize("way", ["buffer", "attribute"])
def test_a_mean_is_not_taken_out_of_a_bias_that_is_no_parameter(way: str) -> None:
    torch.manual_seed(0)
    model, x = Stream().eval(), torch.rand(4, 3, 6, 6)
    held_as(model.first, "bias", way)
    settle(model)
    fast = FastAttackModel(model, **FLOAT32)
    assert not fast._networks.folded.centred
    assert_alike(model, fast, x)
    assert not fast._networks.notes


class OneByOne(nn.Module):
    """Calls its layer on samples without a batch."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inside, self.last = nn.Sequential(*layers), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.stack([self.inside(x[i]) for i in range(4)]).flatten(1))
        return logits


ELSEWHERE: dict[str, Any] = {
    "sequence": lambda: (behind(nn.Linear(5, 8), nn.BatchNorm1d(8), 64), torch.rand(4, 8, 5)),
    "images": lambda: (behind(nn.Linear(5, 8), nn.BatchNorm2d(8), 192), torch.rand(4, 8, 3, 5)),
    "no batch": lambda: (OneByOne(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)).eval(), torch.rand(4, 3, 8)),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_norms_of_another_dimension_than_the_outputs_are_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "filled_in", lambda source: None)  # which would show it before
    model, x = ELSEWHERE[name]()
    norm = next(part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    fast = FastAttackModel(model, **FLOAT32)
    with pytest.warns(FastAttackWarning, match="is not folded into .*, or on inputs with other dimensions.*not-folded"):
        assert_alike(model, fast, x)
    settle(norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_alike(model, fast, x)
    assert fast._networks.folded.report
    assert not any("folded into" in done for done in fast._networks.folded.report.values())


@pytest.mark.filterwarnings("ignore:FastAttackModel of OneByOne")
@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_self_check_sees_norms_of_another_dimension(name: str) -> None:
    model, x = ELSEWHERE[name]()
    fast = FastAttackModel(model, **FLOAT32)
    assert_alike(model, fast, x)
    assert not any("folded into" in done for done in fast._networks.folded.report.values())
    settle(model)
    assert_alike(model, fast, x)


def test_two_dimensions_behind_a_linear_layer_are_folded_in_silence() -> None:
    model, x = behind(nn.Linear(12, 8), nn.BatchNorm1d(8), 8), torch.rand(4, 12)
    fast = FastAttackModel(model, **FLOAT32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_alike(model, fast, x)
        settle(model)
        assert_alike(model, fast, x)
    assert fast._networks.folded.report == {"1": "folded into 0"}
