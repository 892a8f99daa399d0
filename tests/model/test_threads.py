"""Several threads, each with its own attack, on one fast model; and fast models made while other threads work."""

import copy
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, SafePGD, folding, watch_gradients
from fastadv_adapters.foolbox import FastPyTorchModel
from tests.support.tools import attackable_net, batch, fingerprint, input_gradient, small_net

FLOAT32: Any = {"dtype": torch.float32}


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def at_the_same_time(work: list[Callable[[], Any]]) -> list[Any]:
    """Results of all, each in a thread of its own, begun together."""
    results: list[Any] = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = work[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    with switching_often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


def attacks_on(fast: FastAttackModel) -> list[Callable[[], Tensor]]:
    """Attacks of every kind, each with images of its own."""
    generator = torch.Generator().manual_seed(3)
    safe = SafePGD(fast, eps=0.1, steps=4, generator=generator, restarts=2)
    pgd = torchattacks.PGD(fast, eps=0.1, alpha=0.03, steps=4, random_start=False)
    deepfool = torchattacks.DeepFool(fast.view(decisions="exact"), steps=4)
    linf = foolbox.attacks.LinfPGD(steps=4, random_start=False)
    data = [batch(3, seed=seed) for seed in range(4)]

    def run_foolbox() -> Tensor:
        clipped: Tensor = linf(FastPyTorchModel(fast, (0, 1)), *data[3], epsilons=0.1)[1]
        return clipped

    return [lambda: safe(*data[0]), lambda: pgd(*data[1]), lambda: deepfool(*data[2]), run_foolbox]


@pytest.mark.parametrize("folds", [True, False])
def test_threads_with_their_own_attacks_on_one_model_get_what_they_get_alone(folds: bool) -> None:
    net = attackable_net()
    if not folds:
        net.insert(1, Branching(net[1]))
        del net[2]
    alone = [attack() for attack in attacks_on(FastAttackModel(net, **FLOAT32))]
    assert len(alone) == 4
    before = fingerprint(net)
    for _ in range(2):
        together = at_the_same_time(list(attacks_on(FastAttackModel(net, **FLOAT32))))
        for found, expected in zip(together, alone, strict=True):
            assert not isinstance(found, BaseException), found
            assert torch.equal(found, expected)
    assert fingerprint(net) == before


class Branching(nn.Module):
    """Does not trace, so that folds are balanced by counting calls, in each thread by itself."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)) if x.sum() > -1e9 else x
        return out


def test_fast_models_are_made_in_threads_while_others_run_models_and_step_optimizers() -> None:
    """torch.fx patches modules for all threads while it traces."""
    nets, (x, y) = [small_net().eval() for _ in range(4)], batch(2)
    expected, output = input_gradient(FastAttackModel(nets[0], **FLOAT32), x, y), nets[2](x).detach()
    for parameter in nets[3].parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(nets[3].parameters(), lr=0.1)

    def make(net: nn.Module) -> bool:
        found = [input_gradient(FastAttackModel(net, **FLOAT32), x, y) for _ in range(4)]
        return all(torch.equal(f, expected) for f in found)

    def train() -> bool:
        for _ in range(60):
            optimizer.step()
        return all(torch.equal(nets[2](x), output) for _ in range(60))

    assert at_the_same_time([lambda: make(nets[0]), lambda: make(nets[1]), train]) == [True] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
def test_a_thread_that_comes_while_another_builds_a_copy_waits_for_it(
    copied: Callable[[FastAttackModel], FastAttackModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, (x, y) = FastAttackModel(small_net(), **FLOAT32), batch(2)
    wanted, other = input_gradient(fast, x, y), copied(fast)
    building, theirs, found = threading.Event(), folding.trace, list[Tensor]()

    def slow(model: nn.Module) -> Any:
        building.set()
        time.sleep(0.3)
        return theirs(model)

    def late() -> None:
        building.wait()
        found.append(input_gradient(other, x, y))

    monkeypatch.setattr("fastadv_adapters.networks.pair.trace", slow)
    threads = [threading.Thread(target=work, daemon=True) for work in (late, lambda: input_gradient(other, x, y))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert torch.equal(found[0], wanted)


def test_a_watch_sees_the_passes_of_its_own_thread_only() -> None:
    fast, (x, y) = FastAttackModel(small_net(), **FLOAT32), batch()
    input_gradient(fast, x, y)

    def watched(samples: int) -> int:
        with watch_gradients() as watch:
            for _ in range(5):
                input_gradient(fast, x[:samples], y[:samples])
        return -1 if watch.spoilt is None else len(watch.spoilt)

    assert at_the_same_time([lambda n=n: watched(n) for n in (2, 3, 4)]) == [2, 3, 4]  # type: ignore[misc]
