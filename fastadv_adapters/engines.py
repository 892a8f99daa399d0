"""How a network is run on prepared inputs."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .packing import Packed
from .precision import Precision

Run = Callable[[Sequence[Tensor]], Packed]
"""From the tensors of the arguments to the packed output; differentiable where gradients are enabled."""


class EagerEngine:
    """Run the network's own code, one operator after the other.

    Args:
        network: a module in eval mode.
        precision: the context to run it in.
        around: a context for every run, for checks of its own.
        native: dtype that floating inputs are converted to where ``convert`` is not; None takes them as they come.
        convert: whether inputs are brought to the precision's base dtype and memory format first; the full-precision
            twin takes them as they come.
    """

    def __init__(
        self,
        network: nn.Module,
        precision: Precision,
        *,
        convert: bool,
        native: torch.dtype | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.around = around
        self.native = native
        self.network = network
        self.precision = precision
        self.convert = convert

    def bind(self, arguments: Packed) -> Run:
        """The run for one call: everything but the tensors of its arguments is settled."""

        def run(tensors: Sequence[Tensor]) -> Packed:
            entered = list(map(self.precision.enter if self.convert else self._to_native, tensors))
            args, kwargs = arguments.rebuild(entered)
            with self.precision.context(), self.around():
                return Packed(self._call(args, kwargs))

        return run

    def _to_native(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.native) if self.native and tensor.is_floating_point() else tensor

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.network(*args, **kwargs)
