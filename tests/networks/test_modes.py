"""A model in eval mode, parts of which are in training mode."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, FastAttackWarning, compare, evaluate
from fastadv_adapters.modules import left_in_training
from tests.support.tools import batch, input_gradient, small_net


class KeepsTraining(nn.Module):
    """Its own ``train()`` keeps batch norms on the statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def train(self, mode: bool = True) -> "KeepsTraining":
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.training = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


def with_dropout() -> nn.Module:
    model = nn.Sequential(nn.Dropout(0.5), small_net()).eval()
    model[0].train()
    return model


class Noise(nn.Module):
    """Of the user's own, and in training mode alone, as timm's DropPath."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.randn_like(x) if self.training else x


def with_noise() -> nn.Module:
    model = nn.Sequential(Noise(), small_net()).eval()
    model[0].train()
    return model


class Recurrent(nn.Module):
    """Dropout between the layers of an LSTM, over rows of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(24, 8, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.lstm(x.transpose(1, 2).flatten(2))[0].mean(1))
        return logits


def with_recurrent_dropout() -> nn.Module:
    model = Recurrent().eval()
    model.lstm.train()
    return model


@pytest.mark.parametrize("make", [lambda: KeepsTraining().eval(), with_dropout, with_noise, with_recurrent_dropout])
def test_parts_that_stay_in_training_mode_are_told_once(make: type[nn.Module]) -> None:
    model, (x, y) = make(), batch(12)
    fast = FastAttackModel(model, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            input_gradient(fast, x, y)
    (text,) = (str(warning.message) for warning in told if issubclass(warning.category, FastAttackWarning))
    assert "in training mode though the model is in eval mode" in text
    assert text.endswith("#mixed-modes)")
    assert "another one" in fast.summary()
    alike = copy.deepcopy(model)
    for part in alike.modules():
        part.training = False
    assert torch.allclose(fast(x), alike(x), atol=1e-5)


def test_other_kinds_of_calls_are_told_nothing_new_and_nothing_is_built_anew() -> None:
    fast, (x, y) = FastAttackModel(KeepsTraining().eval(), dtype=torch.float32), batch(12)
    with pytest.warns(FastAttackWarning, match="mixed-modes"):
        input_gradient(fast, x[:1], y[:1])
    network, generation = fast._networks.folded.network, fast._networks.generation
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*#samples-coupled")
        input_gradient(fast, x, y)
    assert fast.summary().count("in training mode though") == 1
    assert fast._networks.folded.network is network
    assert fast._networks.generation == generation


def without_rate() -> nn.Module:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(nn.Dropout(0.0), nn.BatchNorm2d(3, track_running_stats=False), Own(), small_net()).eval()
    model[:3].train()
    return model


@pytest.mark.parametrize("make", [small_net, lambda: small_net().train(), without_rate])
def test_modes_that_change_nothing_or_are_those_of_the_whole_model_are_not_told(make: type[nn.Module]) -> None:
    model, (x, y) = make(), batch(12)
    fast = FastAttackModel(model, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*#samples-coupled")
        input_gradient(fast, x, y)
    assert "in training mode" not in fast.summary()


def test_what_differs_in_training_mode() -> None:
    parts = [nn.Dropout(0.1), nn.Dropout(0.0), nn.LSTM(2, 2, 2, dropout=0.1), nn.LSTM(2, 2), nn.RReLU(), nn.ReLU()]
    model = nn.Sequential(*parts, nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    assert left_in_training(model) == {}
    model.training = False
    assert list(left_in_training(model)) == ["0", "2", "4", "6"]


class Averaged(nn.Module):
    """Its ``eval()`` swaps other weights in."""

    def __init__(self, *, by: float) -> None:
        super().__init__()
        self.net = small_net()
        self.other = [p.detach() + by * torch.randn_like(p) for p in self.net.parameters()]

    def train(self, mode: bool = True) -> "Averaged":
        if mode != self.training:
            for parameter, other in zip(self.net.parameters(), self.other, strict=True):
                now = parameter.detach().clone()
                parameter.data.copy_(other)
                other.copy_(now)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.parametrize(("by", "training", "told"), [(0.3, True, True), (0.0, True, False), (0.3, False, False)])
def test_weights_that_the_models_own_eval_writes_are_told_of(by: float, training: bool, told: bool) -> None:
    model, (x, y) = Averaged(by=by).train(training), batch(8)
    weights = copy.deepcopy(model.state_dict())
    fast = FastAttackModel(model, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        input_gradient(fast, x, y)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == told
    assert all("its own eval() writes" in text and text.endswith("#mixed-modes)") for text in texts)
    for report in (
        compare(model, x, y, eps=0.03, repeats=1, progress=False),
        evaluate(model, (x, y), "safe-pgd-ce-1", eps=0.03, progress=False),
    ):
        assert any("call eval() on the model first" in note for note in report.notes) == told
    assert all(model.state_dict()[name].equal(value) for name, value in weights.items())
    if told:
        wanted = copy.deepcopy(model).eval()(x)
        model.eval()
        torch.testing.assert_close(fast.update()(x), wanted, rtol=1e-4, atol=1e-4)
