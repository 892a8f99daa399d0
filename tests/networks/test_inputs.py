"""An audit comes again if the inputs are of another kind than those that the last one saw."""

import pytest
import torch

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.networks.inputs import are_others, glance_at
from fastadv_adapters.networks.schedule import Schedule
from tests.networks.test_losing import Angles, bright_from
from tests.support.tools import cosine, input_gradient, small_net


def test_a_warm_up_on_other_images_hides_nothing() -> None:
    model = Angles(when_bright=0.3).eval()
    fast = FastAttackModel(model, dtype=torch.bfloat16, engine="eager")
    input_gradient(fast, *bright_from(16))
    assert fast.dtype == torch.bfloat16
    with pytest.warns(FastAttackWarning, match="audit-failed"):
        found = input_gradient(fast, *bright_from(0))
    assert (cosine(found, input_gradient(model, *bright_from(0))) > 0.99).all()


def test_what_counts_as_another_kind() -> None:
    torch.manual_seed(0)
    images = [0.15 * torch.randn(64, 3, 1, 1) + 0.45 + 0.2 * torch.randn(64, 3, 8, 8) for _ in range(20)]
    first, *others = (glance_at([x.clamp(0, 1)], [True]) for x in images)
    assert not any(are_others(other, first) for other in others)
    assert not are_others(glance_at([images[0] + 0.03 * torch.randn(64, 3, 8, 8).sign()], [True]), first), "an attack"
    for x in (torch.randn(64, 3, 8, 8), 2 * images[0] - 1, 255 * images[0], 0.2 * images[0], torch.zeros(64, 3, 8, 8)):
        assert are_others(glance_at([x], [True]), first)
    assert glance_at([torch.rand(3), torch.rand(3)], [False, True])[1:] == []


def test_surprises_become_seldom() -> None:
    schedule, source = Schedule(), small_net()
    inputs = [glance_at([torch.full((4, 2), float(number % 2))], [True]) for number in range(60)]
    due = [number for number, one in enumerate(inputs) if schedule.is_due(0, "all", source, one)]
    assert due[:2] == [0, 1]
    assert len(due) < 8
