"""The eager engine: the network's own code, one operator after the other."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..boundary import Crossing, Packed, Pulled, Run, Tape, ends_of
from ..modules import Precision, RunBy


class EagerEngine:
    """Run the network's own code, one operator after the other.

    Args:
        network: a module in eval mode.
        precision: the context to run it in.
        around: a context for every run, for checks of its own.
        native: dtype that floating inputs are converted to where ``convert`` is not; None takes them as they come.
        convert: whether inputs are brought to the precision's base dtype and memory format first.
    """

    name: RunBy = "eager"

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

    def bind(self, arguments: Packed) -> "EagerRun":
        """The run for one call."""
        return EagerRun(self, arguments)

    def follow(self) -> None:
        """Nothing to do: the next run reads the tensors anew."""

    def enter(self, tensor: Tensor) -> Tensor:
        """An input as the network wants it."""
        if self.convert:
            tensor = self.precision.enter(tensor)
        elif self.native and tensor.is_floating_point():
            tensor = tensor.to(self.native)
        return tensor.clone() if tensor.is_leaf and tensor.requires_grad else tensor  # the model may write into it


class EagerRun:
    """One call of an :class:`EagerEngine`; see :class:`Run`.

    Attributes:
        looked_at: whether modes of PyTorch's dispatcher may look at its operators.
    """

    looked_at = True

    def __init__(self, engine: EagerEngine, arguments: Packed) -> None:
        self._engine, self._arguments = engine, arguments

    def __call__(self, tensors: Sequence[Tensor]) -> Packed:
        """The network alone."""
        engine = self._engine
        args, kwargs = self._arguments.rebuild(list(map(engine.enter, tensors)))
        with engine.precision.context(), engine.around():
            output = Packed(engine.network(*args, **kwargs))
        self._arguments.refuse_filled((args, kwargs))
        return output

    def values(self, tensors: Sequence[Tensor], crossing: Crossing) -> Packed:
        """The output without gradients."""
        with torch.no_grad(), ends_of(crossing.rows.ends, self._engine.precision.device.type):
            output = self(tensors)
            return output.holding(crossing.leave(output.tensors))

    def record(self, tensors: Sequence[Tensor], needs: Sequence[bool], crossing: Crossing) -> Tape:
        """Run with a graph."""
        return EagerTape(self, tensors, needs, crossing)


class EagerTape:
    """Leaves, outputs and the graph between them; see :class:`Tape`."""

    def __init__(self, run: Run, tensors: Sequence[Tensor], needs: Sequence[bool], crossing: Crossing) -> None:
        device = crossing.state.device.type  # the first tensor may be a number on the host
        with torch.enable_grad(), ends_of(crossing.rows.ends, device, cut=True) as self._cuts:
            self._leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
            output = run(self._leaves)
        self._outputs = output.tensors
        self._crossing = crossing
        self.differentiable = [o.requires_grad for o in self._outputs]
        self.output = output.holding(crossing.leave(self._outputs))

    def pull(self, grads: Sequence[Tensor | None], *, keep: bool) -> Pulled:
        """The backward pass."""
        return self._crossing.pull(self._outputs, self._leaves, grads, keep=keep, cuts=self._cuts)
