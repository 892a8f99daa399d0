"""The engine that records forward and backward pass once per shape and replays them into the same memory.

On CUDA the recorder is :class:`~fastadv_adapters.engines.graphs.CudaRecorder`. Nothing here knows of CUDA: the
bookkeeping (which forward pass the memory holds, what has to be run again) is the same for any recorder that reuses
its buffers.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..boundary import Crossing, Packed, Pulled, Tape, UnbalancedFoldError
from ..modules import Precision, is_out_of_memory, random_state_kept
from .eager import EagerEngine, EagerRun, EagerTape
from .unchanging import CannotRecordError, addresses, memory_kept, refuse_what_changes

MOST = 32
"""How many kinds of calls (shapes, dtypes, flags) are recorded; others run eager."""

Replay = Callable[[], object]


class Recorder(Protocol):
    """What records work on the device."""

    def busy(self) -> bool:
        """Whether nothing can be recorded or replayed now, since the caller records himself."""

    def turn(self) -> AbstractContextManager[None]:
        """A context for recording and replaying, after all that was replayed before."""

    def uses(self, tensors: Sequence[Tensor]) -> None:
        """These tensors, made outside of the recordings, are about to be read or written in this turn."""

    def warm(self, work: Callable[[], object]) -> None:
        """Run the work off the record, so that libraries make their choices and allocations.

        Raises:
            CannotRecordError: the work waits for the device.
        """

    def capture(self, work: Callable[[], object]) -> Replay:
        """Record the work; whatever it allocates stays where it is."""

    def start_anew(self) -> None:
        """The recordings are forgotten, or one was not finished; those to come share no memory with them."""


class ReplayEngine(EagerEngine):
    """Replay the network, crossing included, from recordings that share one memory.

    Args:
        network, precision, around: as of :class:`EagerEngine`.
        recorder: records on the device.
        give_up: told why, once, if the network cannot be recorded; then everything runs eager.
        most: how many recordings are kept.
    """

    def __init__(
        self,
        network: nn.Module,
        precision: Precision,
        *,
        around: Callable[[], AbstractContextManager[None]],
        recorder: Recorder,
        give_up: Callable[[str], None],
        most: int = MOST,
    ) -> None:
        super().__init__(network, precision, convert=True, around=around)
        self.name = "cudagraph"
        self.recorder = recorder
        self.most = most
        self.held: object = None  # stands for the forward pass whose activations are in the memory
        self._give_up = give_up
        self._lock = threading.RLock()
        self._recordings: dict[Any, Recording] = {}
        self._addresses: list[Any] = []

    def bind(self, arguments: Packed) -> "ReplayRun":
        """The run for one call."""
        return ReplayRun(self, arguments)

    def follow(self) -> None:
        """Forget the recordings if a tensor of the network has moved."""
        with self._lock:
            if self._recordings and self._addresses != self._now_at():
                self._forget()

    def _forget(self) -> None:
        self._recordings.clear()
        self._addresses = []
        self.held = None
        self.recorder.start_anew()

    def _now_at(self) -> list[Any]:
        return addresses(self.network, self.precision.device)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Recordings share their memory: one thread at a time."""
        with self._lock, self.recorder.turn():
            yield

    def plain(self) -> EagerEngine:
        """What is recorded; it does not hold this engine, which holds the recordings: so all is freed at once."""
        return EagerEngine(self.network, self.precision, convert=True, around=self.around)

    def known(self, key: Any) -> "Recording | None":
        """The recording for this key, if there is one."""
        return self._recordings.get(key)

    def takes(self) -> bool:
        """Whether one more kind of call may be recorded."""
        return self.name == "cudagraph" and len(self._recordings) < self.most

    def keep(self, key: Any, recording: "Recording") -> None:
        """Add a recording."""
        self._addresses = self._addresses or self._now_at()
        self._recordings[key] = recording

    def give_up(self, error: Exception) -> None:
        """Run eager from now on."""
        self.name = "eager"
        self._forget()
        reason = str(error) if isinstance(error, CannotRecordError) else f"recording it raised {_in_words(error)}"
        self._give_up(reason)


class ReplayRun(EagerRun):
    """One call of a :class:`ReplayEngine`."""

    _engine: ReplayEngine

    def values(self, tensors: Sequence[Tensor], crossing: Crossing) -> Packed:
        """The output without gradients; a recording with a backward pass serves as well as one without."""
        with torch.inference_mode(False):
            own = [t.clone() if t.is_inference() else t for t in tensors]
            floating = [t.is_floating_point() for t in own]
            known = self._engine.known(self._key(own, floating, crossing)) is not None
            return self.record(own, floating if known else [False] * len(own), crossing).output

    def record(self, tensors: Sequence[Tensor], needs: Sequence[bool], crossing: Crossing) -> Tape:
        """Replay the forward pass, after recording it if this kind of call is new."""
        engine = self._engine
        key = self._key(tensors, needs, crossing)
        if key is None or engine.name == "eager" or engine.recorder.busy():
            return super().record(tensors, needs, crossing)
        with engine.turn():
            recording = engine.known(key)
            failure: Exception | None = None
            if recording is None and engine.takes():
                try:
                    recording = self._recorded(tensors, needs, crossing)
                except UnbalancedFoldError:
                    raise
                except Exception as error:
                    failure = error.with_traceback(None)  # which holds all that the recording had made
                else:
                    engine.keep(key, recording)
            if recording is not None:
                return ReplayTape(engine, recording, tensors)
        tape = super().record(tensors, needs, crossing)  # the model's own error is raised here, as it is
        if failure is not None and not is_out_of_memory(failure):  # which says nothing of the next time
            engine.give_up(failure)
        return tape

    def _recorded(self, tensors: Sequence[Tensor], needs: Sequence[bool], crossing: Crossing) -> "Recording":
        engine = self._engine
        engine.held = None  # recording may run the work
        device = engine.precision.device
        try:
            with (
                crossing.state.kept(),
                random_state_kept(device),
                memory_kept(engine.network),
                refuse_what_changes(engine.network),
            ):
                run = engine.plain().bind(self._arguments.holding([]))  # without the first batch, and what it came from
                return Recording(run, tensors, needs, crossing, engine.recorder)
        except BaseException:
            engine.recorder.start_anew()  # a graph that was made may have been the only one in its memory
            raise

    def _key(self, tensors: Sequence[Tensor], needs: Sequence[bool], crossing: Crossing) -> Any:
        constants, device = self._arguments.constants, self._engine.precision.device
        # A recording would keep the value of a number that lies on the host.
        if constants is None or any(t.numel() == 0 or t.device != device for t in tensors):
            return None
        return crossing, constants, tuple(needs), tuple((t.shape, t.dtype) for t in tensors)


class Recording:
    """One kind of call: its inputs, outputs and gradients at fixed addresses, and the replays between them."""

    def __init__(
        self, run: EagerRun, tensors: Sequence[Tensor], needs: Sequence[bool], crossing: Crossing, recorder: Recorder
    ) -> None:
        self._run, self._needs, self._crossing = run, list(needs), crossing
        self._uses = recorder.uses
        self._inputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        recorder.warm(self._forward)
        self.differentiable = self._tape.differentiable
        self._grads = [torch.ones_like(o) for o in self._tape.output.tensors]
        del self._tape  # and all activations, before others are made
        if any(self.differentiable):
            recorder.warm(self._both)
        self._replay_forward = recorder.capture(self._forward)
        if any(self.differentiable):
            self._replay_backward = recorder.capture(self._backward)

    def _forward(self) -> None:
        self._tape = EagerTape(self._run, self._inputs, self._needs, self._crossing)

    def _backward(self) -> None:
        self._pulled = self._tape.pull(self._grads, keep=False)

    def _both(self) -> None:
        self._forward()
        self._backward()

    def forward(self, tensors: Sequence[Tensor]) -> Packed:
        """Replay on these inputs; what is returned is no part of the memory."""
        self._uses(self._inputs)
        for own, tensor in zip(self._inputs, tensors, strict=True):
            own.copy_(tensor.detach())
        self._replay_forward()
        output = self._tape.output
        return output.holding([o.clone() for o in output.tensors])

    def backward(self, grads: Sequence[Tensor | None]) -> Pulled:
        """Replay from these gradients, after :meth:`forward`; what is returned is no part of the memory."""
        self._uses(self._grads)
        for own, grad in zip(self._grads, grads, strict=True):
            if grad is None:
                own.zero_()
            else:
                own.copy_(grad)
        self._replay_backward()
        gradients, broken = self._pulled
        return Pulled([g.clone() for g in gradients], None if broken is None else broken.clone())


class ReplayTape:
    """One forward pass, as long as no other has overwritten it; see :class:`fastadv_adapters.engines.Tape`."""

    def __init__(self, engine: ReplayEngine, recording: Recording, tensors: Sequence[Tensor]) -> None:
        self._engine, self._recording = engine, recording
        self._own = engine.held = object()
        self.output = recording.forward(tensors)
        self.differentiable = recording.differentiable

    def pull(self, grads: Sequence[Tensor | None], *, keep: bool) -> Pulled | None:
        """The backward pass, or None if the memory was used by another pass, or the caller records this one himself."""
        if self._engine.recorder.busy():
            return None
        with self._engine.turn():
            if self._engine.held is not self._own:
                return None
            self._engine.held = None  # a recorded backward pass reuses the memory of what it has read
            return self._recording.backward(grads)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
