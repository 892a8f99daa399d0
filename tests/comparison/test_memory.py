"""Bytes kept for the backward pass, against sums done by hand."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.shared.networks import resnet18, settle_statistics
from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.comparison.memory import bytes_kept
from tests.networks.test_auditing import CancelsLater, images_for_later
from tests.support.tools import fingerprint, small_net

FLOAT = 4  # bytes


class Slices(nn.Module):
    """Three parts of one tensor, each kept by a product, and one product outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(5, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, 1)
        out: Tensor = q * k * v
        return out


def test_plain_model_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Tanh(), nn.Flatten())
    kept = bytes_kept(net, torch.rand(2, 3, 8, 8))
    # The first convolution keeps the images, ReLU its output (which the second one shares), Tanh its output.
    wanted = {"Tanh": 5 * 36 * FLOAT, "ReLU": 4 * 64 * FLOAT, "Conv2d": 3 * 64 * FLOAT}
    assert kept.by_layer == dict(sorted(wanted.items(), key=lambda item: -item[1]))
    assert kept.total == sum(wanted.values())


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_counted_per_sample(samples: int) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 2))
    assert bytes_kept(net, torch.rand(samples, 6)).by_layer == {"Sigmoid": 8 * FLOAT, "Linear": 6 * FLOAT}


def test_parts_of_one_tensor_are_counted_once_for_the_class_whose_code_keeps_them() -> None:
    kept = bytes_kept(FastAttackModel(Slices(), dtype=torch.float32), torch.rand(3, 5))
    assert kept.by_layer == {"Slices": (12 + 4) * FLOAT}  # what is sliced, and q * k


def test_frozen_weights_and_scales_are_not_counted() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(300, 4))
    fast = FastAttackModel(net, dtype=torch.float32, channels_last=False)
    assert bytes_kept(fast, torch.rand(2, 3, 10, 10)).by_layer == {"ReLU": 300 * FLOAT}


def test_half_precision_keeps_half(untouched: None) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten())
    x = torch.rand(2, 3, 8, 8)
    single, half = (bytes_kept(FastAttackModel(net, dtype=d), x) for d in (torch.float32, torch.bfloat16))
    assert single.by_layer == {"ReLU": 4 * 64 * FLOAT}
    assert half.by_layer == {"ReLU": 4 * 64 * FLOAT / 2}


def test_what_runs_in_float32_after_an_audit_keeps_what_that_keeps() -> None:
    model, x = CancelsLater().eval(), images_for_later(16)[0]
    fast, kept = (
        FastAttackModel(model, dtype=torch.bfloat16),
        bytes_kept(FastAttackModel(model, dtype=torch.float32), x),
    )
    before = bytes_kept(fast, x)
    with pytest.warns(FastAttackWarning, match="audit-failed"):
        fast(x.requires_grad_()).square().sum().backward()
    assert bytes_kept(fast, x) == kept
    assert kept.total > before.total


def test_autocast_around_the_call_counts_for_a_plain_model() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
    x = torch.rand(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        kept = bytes_kept(net, x)
    assert kept.by_layer["ReLU"] == 8 * FLOAT / 2
    assert bytes_kept(net, x).by_layer["ReLU"] == 8 * FLOAT


def test_resnet18_in_float16_keeps_at_most_a_quarter_of_the_plain_model() -> None:
    x = torch.rand(1, 3, 32, 32)
    net = settle_statistics(resnet18(width=8), torch.rand(4, 3, 32, 32))
    plain = bytes_kept(net, x)
    fast = bytes_kept(FastAttackModel(net, dtype=torch.float16), x)
    assert fast.total <= plain.total / 4
    assert set(fast.by_layer) == {"ReLU", "PostActivationBlock"}  # no batch norm, no convolution


def test_nothing_changes() -> None:
    net, x = small_net().train(), torch.rand(2, 3, 8, 8)
    before, random = fingerprint(net), torch.get_rng_state()
    fast = FastAttackModel(net, dtype=torch.float32)
    stats = fast.gradient_stats
    for model in (net, fast):
        assert bytes_kept(model, x) == bytes_kept(model, x)
    assert fingerprint(net) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert fast.gradient_stats == stats
    assert not x.requires_grad


def test_follows_the_wrapped_model() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 2))
    fast, x = FastAttackModel(net, dtype=torch.float32), torch.rand(2, 6)
    assert bytes_kept(fast, x).total == 8 * FLOAT
    net[0], net[2] = nn.Linear(6, 9), nn.Linear(9, 2)
    assert bytes_kept(fast, x).total == 9 * FLOAT


def test_refuses_what_has_nothing_to_count() -> None:
    net = nn.Linear(6, 8)
    with pytest.raises(ValueError, match="expected at least one sample, got none"):
        bytes_kept(net, torch.rand(0, 6))
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        bytes_kept(net, torch.ones(2, 6, dtype=torch.long))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        bytes_kept([net], torch.rand(2, 6))  # type: ignore[arg-type]


class Counting(nn.Linear):
    """Counts its calls in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x)


def test_buffers_of_a_plain_model_are_left_alone() -> None:
    model = Counting()
    bytes_kept(model, torch.rand(2, 4))
    assert model.calls == 0


def test_a_fast_model_that_waits_for_update_goes_on_waiting() -> None:
    net, x = small_net(), torch.rand(2, 3, 8, 8)
    fast = FastAttackModel(net, auto_update=False, dtype=torch.float32)
    before = fast(x.clone().requires_grad_()).detach()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    bytes_kept(fast, x)
    assert torch.equal(fast(x.clone().requires_grad_()).detach(), before)
