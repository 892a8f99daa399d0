"""One kind of call, recorded: its forward and backward pass at fixed addresses."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, cast

import torch
from torch import Tensor

from ..boundary import Crossing, Packed, Pulled
from .eager import EagerRun

Replay = Callable[[], object]

Given = tuple[bool, ...]
"""For each output, whether a gradient comes in there."""


class Recorder(Protocol):
    """What records work on the device."""

    def busy(self) -> bool:
        """Whether nothing can be recorded or replayed now, since the caller records himself."""

    def turn(self) -> AbstractContextManager[None]:
        """A context for recording and replaying, after all that was replayed before."""

    def uses(self, tensors: Sequence[Tensor]) -> None:
        """These tensors, made outside of the recordings, are about to be read or written in this turn."""

    def warm(self, work: Callable[[], object], *, looks: bool) -> None:
        """Run the work off the record, so that libraries make their choices and allocations.

        Args:
            work: what is to be recorded.
            looks: whether to look at its operators, which a compiler does not allow.

        Raises:
            CannotRecordError: the work waits for the device.
        """

    def capture(self, work: Callable[[], object]) -> Replay:
        """Record the work; whatever it allocates stays where it is."""

    def start_anew(self) -> None:
        """The recordings are forgotten, or one was not finished; those to come share no memory with them."""


class Recording:
    """One kind of call: its inputs, outputs and gradients at fixed addresses, and the replays between them.

    Attributes:
        passes: how many forward passes there were.
        compiled: whether it is of the compiled network.
        given: at which outputs gradients come in. A zero in the place of none would be NaN behind an infinite
            derivative.
    """

    compiled = False

    def __init__(
        self,
        run: EagerRun,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        crossing: Crossing,
        recorder: Recorder,
        *,
        given: Given | None = None,
    ) -> None:
        self._run, self._needs, self._crossing = run, list(needs), crossing
        self._uses = recorder.uses
        self.passes = 0
        self._inputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        looks = run.looked_at
        recorder.warm(self._forward, looks=looks)
        self.differentiable = self._tape.differentiable
        self.given = tuple(self.differentiable) if given is None else given
        self._grads = [
            torch.ones_like(o) if come_in else None
            for o, come_in in zip(self._tape.output.tensors, self.given, strict=True)
        ]
        del self._tape  # and all activations, before others are made
        if any(self.differentiable):
            recorder.warm(self._both, looks=looks)
        self._replay_forward = recorder.capture(self._forward)
        if any(self.differentiable):
            self._replay_backward = recorder.capture(self._backward)

    def _forward(self) -> None:
        self._tape = self._run.record(self._inputs, self._needs, self._crossing)

    def _backward(self) -> None:
        self._pulled = cast(Pulled, self._tape.pull(self._grads, keep=False))  # such a tape always can

    def _both(self) -> None:
        self._forward()
        self._backward()

    def forward(self, tensors: Sequence[Tensor]) -> Packed:
        """Replay on these inputs; what is returned is no part of the memory."""
        self.passes += 1
        self._uses(self._inputs)
        for own, tensor in zip(self._inputs, tensors, strict=True):
            own.copy_(tensor.detach())
        self._replay_forward()
        output = self._tape.output
        return output.holding([o.clone() for o in output.tensors])

    def backward(self, grads: Sequence[Tensor | None]) -> Pulled:
        """Replay from these gradients, after :meth:`forward`; what is returned is no part of the memory."""
        self._uses([own for own in self._grads if own is not None])
        for own, grad in zip(self._grads, grads, strict=True):
            if own is not None and grad is not None:
                own.copy_(grad)
        self._replay_backward()
        gradients, spoilt = self._pulled
        return Pulled([g.clone() for g in gradients], None if spoilt is None else spoilt.clone())
