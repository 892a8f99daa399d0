"""Runs of a random model that draw the same numbers each time, so that they can be compared."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..boundary import Packed
from ..modules import generator_states, random_state_kept


class SameDraws:
    """Runs a model from one random state, which is as before afterwards.

    Attributes:
        drawn: whether the model draws from a generator that can be looked at; None before the first run.
    """

    def __init__(self, run: Callable[[Sequence[Tensor]], Packed], device: torch.device) -> None:
        self._run, self._device = run, device
        self.drawn: bool | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> Packed:
        """The outputs, as of every run on these tensors."""
        with random_state_kept(self._device):
            if self.drawn is not None:
                return self._run(tensors)
            before = generator_states(self._device)
            outputs = self._run(tensors)
            self.drawn = before != generator_states(self._device)
            return outputs
