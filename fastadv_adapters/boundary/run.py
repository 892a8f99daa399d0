"""What the boundary asks of a network that runs behind it, whichever engine runs it."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..modules import Precision, RunBy
from .crossing import Crossing, Pulled
from .packing import Packed


class UnbalancedFoldError(RuntimeError):
    """A layer was called without the batch norm that it is folded or centred for, or the other way round.

    The args are names of layers.
    """


class Tape(Protocol):
    """What a forward pass with gradients leaves behind.

    Attributes:
        output: the packed output; its tensors are as they leave the boundary.
        differentiable: for each of these tensors, whether it depends on an input that requires a gradient.
    """

    output: Packed
    differentiable: list[bool]

    def pull(self, grads: Sequence[Tensor | None], *, keep: bool) -> Pulled | None:
        """The backward pass; None if what it needs has been overwritten, and the forward pass is to be run again.

        Args:
            grads: at the output's tensors.
            keep: whether there may be another backward pass.
        """


class Run(Protocol):
    """The run for one call: everything but the tensors of its arguments is settled."""

    def __call__(self, tensors: Sequence[Tensor]) -> Packed:
        """The network alone, past the boundary; differentiable where gradients are enabled."""

    def values(self, tensors: Sequence[Tensor], crossing: Crossing) -> Packed:
        """The output without gradients, as it leaves the boundary."""

    def record(self, tensors: Sequence[Tensor], needs: Sequence[bool], crossing: Crossing) -> Tape:
        """Run with a graph that stays behind the boundary; ``needs`` says which tensors want a gradient."""


class Engine(Protocol):
    """A way to run one network.

    Attributes:
        name: as in the option ``engine``; "eager" once this engine has given up.
        precision: how the network computes.
    """

    name: RunBy
    precision: Precision

    def bind(self, arguments: Packed) -> Run:
        """The run for one call."""

    def follow(self) -> None:
        """The network's tensors have been brought up to date in place."""
