"""What a kind of call runs in after half precision was found wanting, and who keeps running as it did."""

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.networks import Networks, audited
from fastadv_adapters.networks.finding import Finding
from tests.networks.test_auditing import CancelsLater, images_for_later
from tests.support.tools import batch, cosine, input_gradient


def only_kind(fast: FastAttackModel) -> Any:
    (kind,) = fast._networks.kinds.values()
    return kind


def test_running_out_of_memory_while_another_is_made_leaves_the_kind_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = CancelsLater().eval(), images_for_later(16)
    fast, made = FastAttackModel(model, dtype=torch.bfloat16), Networks.network_in

    def exhausted(self: Networks, dtype: torch.dtype) -> Any:
        if dtype == torch.float32:
            raise torch.OutOfMemoryError("out of memory")
        return made(self, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(Networks, "network_in", exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            input_gradient(fast, x, y)
    assert only_kind(fast).dtype == torch.bfloat16
    with pytest.warns(FastAttackWarning, match="audit-failed"):
        found = input_gradient(fast, x, y)
    assert only_kind(fast).dtype == torch.float32
    assert (cosine(found, input_gradient(model, x, y)) > 0.97).all()


class NotInFloat16(CancelsLater):
    """One of its operators has no kernel for float16."""

    raised = 0

    def forward(self, x: Tensor, *, safe: bool = False) -> Tensor:
        logits = super().forward(x, safe=safe)
        lowered = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
        if lowered:
            NotInFloat16.raised += 1
            raise RuntimeError('"forward_kernel" not implemented for this model')
        return logits


def test_a_precision_in_which_it_raises_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audited, "is_in_hardware", lambda dtype, device: True)
    model, (x, y) = NotInFloat16().eval(), images_for_later(16)
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    with pytest.warns(FastAttackWarning, match="audit-failed"):
        found = input_gradient(fast, x, y)
    assert NotInFloat16.raised > 0, "float16 was tried"
    assert only_kind(fast).dtype == torch.float32
    assert (cosine(found, input_gradient(model, x, y)) > 0.97).all()


class TwoHeads(nn.Module):
    """Another last layer in each of its kinds of calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(48, 32)
        self.one, self.two = nn.Linear(32, 10), nn.Linear(32, 10)

    def forward(self, x: Tensor, head: str = "one") -> Tensor:
        logits: Tensor = getattr(self, head)(F.gelu(self.body(x.flatten(1))))
        return logits.softmax(1)


def test_a_kind_that_comes_later_to_another_half_precision_ends_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audited, "is_in_hardware", lambda dtype, device: True)
    fast, (x, _) = FastAttackModel(TwoHeads().eval(), dtype=torch.float16), images_for_later(16)
    for head in ("one", "two"):
        fast(x.clone().requires_grad_(), head=head).sum().backward()
        kind = list(fast._networks.kinds.values())[-1]
        others = fast._networks._others(kind, Finding(8, 1, 1.0))
        (other,) = [network for network in others if network.precision.dtype == torch.bfloat16]
        assert head in other.ends


class OneSize(CancelsLater):
    """Takes batches of 15 alone."""

    def forward(self, x: Tensor, *, safe: bool = False) -> Tensor:
        if len(x) != 15:
            raise ValueError("expected 15 images")
        return super().forward(x, safe=safe)


def test_a_model_that_takes_an_odd_batch_alone_is_audited() -> None:
    model, (x, y) = OneSize().eval(), images_for_later(15)
    x[:, 0, 0, 0] = (torch.arange(15) < 10).float()  # most are not dark: outputs of the median sample are right
    fast, truth = FastAttackModel(model, dtype=torch.bfloat16), input_gradient(model, x, y)
    with pytest.warns(FastAttackWarning, match="audit-failed"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, truth) > 0.97).all()


SOURCE = np.random.default_rng(0)


class Noisy(nn.Module):
    """Noise at its input, by a generator that the model holds or by one that nobody can look at."""

    def __init__(self, source: Any, number: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source, self.number = source, number
        self.first, self.last = nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        source = SOURCE if self.source is None else self.source
        noise = [[source.gauss(0, 1) for _ in range(48)] for _ in x] if isinstance(source, random.Random) else None
        drawn = source.normal(size=(len(x), 48)) if noise is None else noise
        hidden = self.first(x.flatten(1) + 0.1 * torch.as_tensor(drawn, dtype=x.dtype))
        logits: Tensor = self.last(F.gelu(((hidden + self.number) - self.number) * 3))
        return logits


@pytest.mark.parametrize("held", [True, False], ids=["held", "not held"])
@pytest.mark.parametrize("kind", ["NumPy", "Python"])
def test_noise_of_any_generator_neither_hides_nor_feigns_outputs_that_are_off(kind: str, held: bool) -> None:
    own = np.random.default_rng(0) if kind == "NumPy" else random.Random(0)
    x, y = batch(16)
    x = x[:, :, :4, :4].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAttackWarning)
        fast = FastAttackModel(Noisy(own if held else None, 0.0).eval(), dtype=torch.bfloat16)
        input_gradient(fast, x, y)
    assert only_kind(fast).dtype == torch.bfloat16
    with pytest.warns(FastAttackWarning, match=r"its outputs are off by .*#not-half"):
        input_gradient(FastAttackModel(Noisy(own if held else None, 3e3).eval(), dtype=torch.bfloat16), x, y)
