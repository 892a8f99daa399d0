"""What the tests against foolbox's own behaviour share: a plain and a fast model side by side, at the same seed."""

import copy
from collections.abc import Callable
from typing import Any

import eagerpy as ep
import foolbox as fb
import numpy as np
import torch

from fastadv_adapters.foolbox import FastPyTorchModel
from tests.tools import attackable_net, batch

CLOSE: Any = {"rtol": 0, "atol": 1e-5}
EQUAL: Any = {"rtol": 0, "atol": 0}

Run = Callable[[Any], Any]


class Problem:
    """One model, plain and fast in float32; images with the labels that it gives them, and other classes."""

    def __init__(self, **options: Any) -> None:
        self.net = attackable_net()
        self.plain = fb.PyTorchModel(copy.deepcopy(self.net), bounds=(0, 1), **options)
        self.fast = FastPyTorchModel(self.net, bounds=(0, 1), dtype=torch.float32, decisions="exact", **options)
        self.x, _ = batch(10)
        self.y = self.plain(self.x).argmax(1)
        self.targets = self.plain(self.x).topk(2).indices[:, 1]

    def same(self, run: Run, tolerance: Any = CLOSE) -> Any:
        """Assert that both models lead to the same; returns what the fast one led to."""
        expected, found = (seeded(run, model) for model in (self.plain, self.fast))
        assert_same(found, expected, tolerance)
        return found


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
