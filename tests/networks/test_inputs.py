"""An audit comes again if inputs, or gradients that come in, are of another kind than those that the last one saw."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.networks.inputs import Heard, are_others, balanced, glance_at
from fastadv_adapters.networks.schedule import Schedule
from tests.networks.test_losing import Angles, bright_from
from tests.networks.test_shared_parts import SharedPart
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


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "energy": lambda z: z.logsumexp(1).sum(),
    "largest": lambda z: z.amax(1).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_pass_with_another_loss_hides_nothing(loss: str) -> None:
    model, x, y = SharedPart().eval(), torch.rand(16, 3, 4, 4), torch.arange(16) % 10
    fast = FastAttackModel(model, dtype=torch.bfloat16)
    for _ in range(3):
        LOSSES[loss](fast(x.clone().requires_grad_())).backward()
    assert fast.dtype == torch.bfloat16
    with pytest.warns(FastAttackWarning, match="audit-failed"):
        found = input_gradient(fast, x, y)
    assert (cosine(found, input_gradient(model, x, y)) > 0.99).all()


def test_which_losses_are_balanced() -> None:
    torch.manual_seed(0)
    y = torch.arange(32) % 10
    for size in (0.01, 1.0, 30.0, 200.0):
        logits = (size * torch.randn(32, 10)).requires_grad_()
        margin = logits.gather(1, y[:, None]).squeeze(1) - logits.scatter(1, y[:, None], -torch.inf).amax(1)
        for value in (F.cross_entropy(logits, y), F.cross_entropy(logits, y, reduction="sum"), margin.sum()):
            assert balanced(torch.autograd.grad(value, logits, retain_graph=True)) == (True,)
        for other in LOSSES.values():
            assert balanced(torch.autograd.grad(other(logits), logits, retain_graph=True)) == (False,)
    assert balanced([None, torch.ones(4), torch.ones(4, 0)]) == (False, False, False)


def test_losses_on_other_entries_of_an_output_are_told_apart() -> None:
    """Whether each sample reads all entries of a task or two of them; single ones and small batches tell nothing."""
    heard, rows = Heard(), torch.arange(8)
    first, second, both, margin, single = torch.zeros(5, 8, 20).unbind()
    first[:, :10], second[:, 10:], both[:], single[:, 12] = 1.0, 1.0, 1.0, 1.0
    margin[rows, 10 + rows], margin[rows, 19] = 1.0, -1.0
    anchors = second.expand(8, 4, 8, 20)[0]
    finished = first.index_fill(0, torch.arange(5), 0.0)
    passes = [first, finished, single, second, margin, anchors, both, first[:4], first, torch.zeros(8, 20)]
    assert [heard.numbers([one, None]) for one in passes] == [(n, -1) for n in (0, 0, 0, 1, 1, 1, 2, 2, 0, 0)]


def test_no_more_are_told_apart_than_audits_may_cost() -> None:
    heard = Heard()
    of_three = [(torch.arange(60) // 3 == i).float().expand(8, 60) for i in range(20)]
    assert [heard.numbers([one])[0] for one in of_three] == [*range(7), *[7] * 13]
