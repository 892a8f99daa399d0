"""What the tests against foolbox's own behaviour share: a plain and a fast model side by side, at the same seed."""

import copy
from collections.abc import Callable
from typing import Any

import eagerpy as ep
import foolbox as fb
import numpy as np
import torch
from torch import Tensor

from fastadv_adapters.foolbox import FastPyTorchModel
from tests.support.tools import attackable_net, batch

CLOSE: Any = {"rtol": 0, "atol": 1e-5}
EQUAL: Any = {"rtol": 0, "atol": 0}

EXACT: Any = {"dtype": torch.float32, "decisions": "exact"}
"""Options at which all is as on the plain model."""

USUAL: dict[str, Any] = {"defaults": {}, "bfloat16": {"dtype": torch.bfloat16}}
"""Options as most give them: the gradients are rounded, so that images differ and only their strength is alike."""

Run = Callable[[Any], Any]


class Problem:
    """One model, plain and fast; images with the labels that it gives them, and other classes."""

    def __init__(self, *, fast: Any = EXACT, samples: int = 10, **options: Any) -> None:
        self.net = attackable_net()
        self.plain = fb.PyTorchModel(copy.deepcopy(self.net), bounds=(0, 1), **options)
        self.fast = FastPyTorchModel(self.net, bounds=(0, 1), **fast, **options)
        self.x, _ = batch(samples)
        self.y = self.plain(self.x).argmax(1)
        self.targets = self.plain(self.x).topk(2).indices[:, 1]

    def same(self, run: Run, tolerance: Any = CLOSE) -> Any:
        """Assert that both models lead to the same; returns what the fast one led to."""
        expected, found = (seeded(run, model) for model in (self.plain, self.fast))
        assert_same(found, expected, tolerance)
        return found


def assert_as_strong(attack: Any, plain: Any, fast: Any, x: Tensor, criterion: Any, epsilon: float | None) -> None:
    """Assert that the attack succeeds as often and as near, and only where the plain model says so."""
    results = [seeded(lambda model: attack(model, x, criterion, epsilons=epsilon), model) for model in (plain, fast)]
    (_, expected, fooled), (_, found, success) = results
    low, high = plain.bounds
    assert low <= float(found.min()) <= float(found.max()) <= high
    assert torch.equal(success, criterion(found, plain(found)))
    assert fooled.sum() >= len(x) / 5, "or an attack that does nothing would pass"
    assert abs(int(success.sum()) - int(fooled.sum())) <= 0.06 * len(x)
    far, wanted = (attack.distance(x, images) for images in (found, expected))
    if epsilon is None:
        torch.testing.assert_close(far.median(), wanted.median(), rtol=0.05, atol=0)
    else:
        assert float(far.max()) <= epsilon + 1e-5


def seeded(run: Run, model: Any) -> Any:
    """What a run leads to from the same random state."""
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the one that foolbox draws from
    return run(model)


def assert_same(found: Any, expected: Any, tolerance: Any = CLOSE) -> None:
    """The same kinds, and values within the tolerance."""
    assert type(found) is type(expected)
    if isinstance(expected, (list, tuple)):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, tolerance)
    elif isinstance(expected, ep.Tensor):
        torch.testing.assert_close(found.raw, expected.raw, **tolerance)
    else:
        torch.testing.assert_close(found, expected, **tolerance)
