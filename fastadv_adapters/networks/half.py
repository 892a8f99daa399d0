"""A run of the fast network in half precision: how large may its gradients be?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..boundary import FLOOR, STEP, Ends
from ..modules import filled_gradients_of
from .nearness import lost

_HEADROOM = 2**2  # between the gradient that is tried in half precision and the point of overflow


@dataclass
class Half:
    """A run of the fast network in half precision.

    Attributes:
        ends: where half precision ends; None if it reaches the outputs.
        places: the tensors there, with their graph.
        leaves: the inputs.
    """

    ends: Ends | None
    places: list[Tensor]
    leaves: list[Tensor]

    def gradients(self, exponent: int) -> Sequence[Tensor]:
        """The gradients at the inputs from ones at the places with headroom above this power of two."""
        largest = _HEADROOM * 2.0 ** (exponent + 1)
        weights = [(weights_for(p).float() * largest).to(p.dtype) for p in self.places]
        return filled_gradients_of(self.places, self.leaves, weights, retain_graph=True)

    def largest(self, full: Sequence[Tensor], highest: int) -> int | None:
        """The largest exponent at which no gradient is lost that is finite in full precision; None if there is none."""
        for exponent in range(highest, FLOOR - 1, -STEP):
            if not any(lost(g, f) for g, f in zip(self.gradients(exponent), full, strict=True)):
                return exponent
        return None


def weights_for(output: Tensor) -> Tensor:
    """Fixed weights that no symmetry of a softmax cancels, the same for every sample."""
    row = output.shape[1:]  # there may be no sample, as at an expert that none is sent to
    ramp = torch.arange(math.prod(row), device=output.device, dtype=torch.float32)
    return torch.cos(1.0 + 1.7 * ramp).view(row).expand_as(output).to(output.dtype)
