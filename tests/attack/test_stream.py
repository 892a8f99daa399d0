"""Samples that pass through SafePGD one by one end where they would in a batch."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.attack import Departed, Entrants, Norm, Streaming, stream_of
from fastadv_adapters.networks import Kind, Schedule
from tests.attack.test_rescue import Spoilt, marked_task
from tests.support.tools import attackable_net, batch

BUDGETS: dict[Norm, float] = {"linf": 0.008, "l2": 0.06, "l1": 0.8}


@pytest.fixture(scope="module")
def fast() -> FastAttackModel:
    return FastAttackModel(attackable_net(), dtype=torch.float32)


def classified(fast: FastAttackModel, samples: int = 24) -> tuple[Tensor, Tensor]:
    """Images with the labels that the model gives them."""
    x, _ = batch(samples)
    return x, fast.view(decisions="exact")(x).argmax(1)


def streamed(
    attack: SafePGD, x: Tensor, y: Tensor, *, capacity: int = 8, rivals: Tensor | None = None, passes: int = 1
) -> list[Departed]:
    """All samples through a stream, in the order in which they leave."""
    chosen = torch.zeros(len(x), 0, dtype=torch.int64) if rivals is None else rivals
    way = Streaming(
        norm=attack.norm,
        eps=attack.eps,
        bounds=attack.bounds,
        starts=chosen.shape[1] or (attack.restarts if attack.random_start else 1),
        capacity=capacity,
        seed_of=lambda index, start: 1000 * index + start,
        passes=passes,
    )
    waiting = iter(range(len(x)))

    def entrants(count: int) -> Entrants | None:
        index = torch.tensor(list(islice(waiting, count)), dtype=torch.int64)
        return Entrants(index, x[index], y[index], chosen[index]) if len(index) else None

    return list(stream_of(attack, way, rivals=rivals is not None, largest_label=9).run(entrants))


def samples(gone: list[Departed]) -> Iterator[tuple[int, Tensor, bool]]:
    for some in gone:
        yield from zip(some.index, some.x, some.claimed.tolist(), strict=True)


def in_order(gone: list[Departed]) -> Tensor:
    return torch.stack([x for _, x, _ in sorted(samples(gone), key=lambda sample: sample[0])])


@pytest.mark.parametrize("norm", BUDGETS)
@pytest.mark.parametrize(
    "settings", [{"loss": "auto"}, {"loss": "ce", "alpha": True}, {"loss": "dlr"}], ids=["auto", "in cycles", "dlr"]
)
def test_without_random_starts_every_candidate_is_that_of_a_batch(
    fast: FastAttackModel, norm: Norm, settings: dict[str, Any]
) -> None:
    eps = BUDGETS[norm]
    alpha = eps / 2 if settings.get("alpha") else None
    given = {**settings, "alpha": alpha}
    attack = SafePGD(fast, eps=eps, norm=norm, steps=10, random_start=False, early_stop=True, **given)
    x, y = classified(fast)
    found, gone = attack(x, y), streamed(attack, x, y)
    torch.testing.assert_close(in_order(gone), found, rtol=0, atol=0 if norm == "linf" else 1e-6)  # sums round
    broken = fast.view(decisions="exact")(found).argmax(1) != y
    assert [claimed for *_, claimed in sorted(samples(gone), key=lambda sample: sample[0])] == broken.tolist()
    assert 0 < broken.sum() < len(x), "the budget should break some"


def test_neither_the_capacity_nor_the_order_changes_a_bit(fast: FastAttackModel) -> None:
    attack = SafePGD(fast, eps=BUDGETS["linf"], steps=6, restarts=2)
    x, y = classified(fast)
    small, large = streamed(attack, x, y), streamed(attack, x, y, capacity=64)
    torch.testing.assert_close(in_order(small), in_order(large), rtol=0, atol=0)
    assert [i for i, *_ in samples(small)] != [i for i, *_ in samples(large)], "who leaves first should differ"


def test_the_place_of_who_leaves_is_taken_at_once(fast: FastAttackModel) -> None:
    x, y = classified(fast)
    steps = 20
    attack = SafePGD(fast, eps=4 * BUDGETS["linf"], steps=steps)
    fast.reset_gradient_stats()
    gone = streamed(attack, x, y)
    needed = sum(int(some.backwards.sum()) for some in gone)
    rows = fast.gradient_stats.samples
    assert needed < 0.5 * steps * len(x)
    assert rows <= needed + 8 * steps, "only at the end are there copies that fill up a batch"


def test_each_start_raises_the_class_whose_turn_it_is(fast: FastAttackModel) -> None:
    x, y = classified(fast)
    rivals = fast(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :3]
    attack = SafePGD(fast, eps=BUDGETS["linf"], steps=6, random_start=False)
    one = [claimed for *_, claimed in sorted(samples(streamed(attack, x, y, rivals=rivals[:, -1:])))]
    every = [claimed for *_, claimed in sorted(samples(streamed(attack, x, y, rivals=rivals)))]
    assert all(b >= a for a, b in zip(one, every, strict=True))
    assert sum(every) > sum(one)


def test_samples_with_broken_gradients_are_attacked_again_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kind, "loses_more", lambda *_: False)  # as on CUDA, where they are not run again at once
    monkeypatch.setattr(Schedule, "is_losing", lambda *_, **__: False)  # else float32 serves them soon
    net, x, y, rows = marked_task()
    half = FastAttackModel(Spoilt(net, torch.nan), dtype=torch.float16)
    full = FastAttackModel(net, dtype=torch.float32)
    claims = []
    for fast in (half, full):
        gone = streamed(SafePGD(fast, eps=0.05, steps=5, random_start=False), x, y)
        claims.append({index: claimed for index, _, claimed in samples(gone)})
    assert half.gradient_stats.nonfinite > 0, "else this tests nothing"
    broken = [index for index in rows.nonzero().flatten().tolist() if claims[1][index]]
    assert broken
    assert all(claims[0][index] for index in broken)


def test_nobody_comes_and_nobody_leaves(fast: FastAttackModel) -> None:
    assert streamed(SafePGD(fast, eps=0.1), *classified(fast, samples=0)) == []


@pytest.mark.parametrize("samples", [4, 12])
def test_every_vote_on_the_last_iterate_is_cast_whoever_stands_beside(samples: int, fast: FastAttackModel) -> None:
    x, y = classified(fast, samples)
    attack = SafePGD(fast, eps=1e-6, steps=2, random_start=False, loss="ce")
    gone = streamed(attack, x, y, passes=5)
    assert {int(count) for some in gone for count in some.forwards} == {4 * 5}


class WithoutMedians(TorchFunctionMode):
    """Refuses medians with their places, as CUDA does under ``torch.use_deterministic_algorithms(True)``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.median, Tensor.median) and len(args) + len(kwargs or {}) > 1:
            raise RuntimeError("median CUDA with indices output does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


def test_verdicts_of_several_passes_need_no_operator_that_deterministic_algorithms_lack(fast: FastAttackModel) -> None:
    x, y = classified(fast)
    attack = SafePGD(fast, eps=0.05, steps=4, random_start=False)
    wanted = in_order(streamed(attack, x, y))
    with WithoutMedians():
        assert torch.equal(in_order(streamed(attack, x, y, passes=4)), wanted)
