"""The engine that records forward and backward pass once per shape and replays them into the same memory.

On CUDA the recorder is :class:`~fastadv_adapters.engines.graphs.CudaRecorder`. Nothing here knows of CUDA: the
bookkeeping (which forward pass the memory holds, what has to be run again) is the same for any recorder that reuses
its buffers.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..boundary import Crossing, Packed, Pulled, Tape, UnbalancedFoldError
from ..modules import Precision, first_line, is_out_of_memory, random_state_kept, unhooked
from .compiled import CompileEngine, GiveUp
from .eager import EagerEngine, EagerRun
from .recording import Given, Recorder, Recording
from .unchanging import CannotRecordError, addresses, memory_kept, refuse_what_changes

MOST = 32
"""How many kinds of calls (shapes, dtypes, flags) are recorded; others run eager."""


class ReplayEngine(EagerEngine):
    """Replay the network, crossing included, from recordings that share one memory.

    Args:
        network, precision, around: as of :class:`EagerEngine`.
        recorder: records on the device.
        give_up: told why, once, if the network cannot be recorded, or not compiled.
        compiled: runs the network compiled; None never does. If it cannot be compiled, or not recorded so, eager
            operators are recorded; if these cannot be either, everything runs eager.
        compile_after: after how many passes of one kind its recording is made anew of the compiled network. Nobody's
            first attack is to wait for a compiler whose work it does not use.
        most: how many recordings are kept.
    """

    def __init__(
        self,
        network: nn.Module,
        precision: Precision,
        *,
        around: Callable[[], AbstractContextManager[None]],
        recorder: Recorder,
        give_up: GiveUp,
        compiled: CompileEngine | None = None,
        compile_after: int = 0,
        most: int = MOST,
    ) -> None:
        super().__init__(network, precision, convert=True, around=around)
        self.name = "compile" if compiled is not None and compile_after == 0 else "cudagraph"
        self._compiled, self._compile_after = compiled, compile_after
        self.recorder = recorder
        self.most = most
        self.held: object = None  # stands for the forward pass whose activations are in the memory
        self._give_up = give_up
        self._lock = threading.RLock()
        self._recordings: dict[Any, Recording] = {}
        self.given: dict[Any, Given | None] = {}  # where gradients came in last, by kind of call; None at all outputs
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
        self.given.clear()
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

    def recorded(self, *, compiled: bool) -> EagerEngine:
        """What is recorded; it does not hold this engine, which holds the recordings: so all is freed at once."""
        if compiled and self._compiled is not None:
            return self._compiled
        return EagerEngine(self.network, self.precision, convert=True, around=self.around)

    def known(self, key: Any) -> Recording | None:
        """The recording for this key, if there is one."""
        return self._recordings.get(key)

    def takes(self) -> bool:
        """Whether one more kind of call may be recorded."""
        return self.name != "eager" and len(self._recordings) < self.most

    def wants_compiled(self, recording: Recording | None) -> bool:
        """Whether a kind of call with this recording is to be recorded of the compiled network now."""
        if self._compiled is None or self._compiled.name == "eager":
            return False
        passes = 0 if recording is None else recording.passes
        return passes >= self._compile_after and not (recording is not None and recording.compiled)

    def keep(self, key: Any, recording: Recording) -> None:
        """Add a recording."""
        self._addresses = self._addresses or self._now_at()
        self._recordings[key] = recording
        if self._compiled is not None:
            self.name = "compile" if self._compiled.name == "compile" and recording.compiled else "cudagraph"

    def give_up_compiling(self, error: Exception) -> None:
        """Record eager operators from now on."""
        if self._compiled is not None:
            self._compiled.give_up(error)
            self.name = "cudagraph"

    def give_up(self, error: Exception) -> None:
        """Run eager from now on."""
        self.name = "eager"
        self._forget()
        reason = str(error) if isinstance(error, CannotRecordError) else f"recording it raised {first_line(error)}"
        self._give_up(reason)


class ReplayRun(EagerRun):
    """One call of a :class:`ReplayEngine`."""

    _engine: ReplayEngine

    def values(self, tensors: Sequence[Tensor], crossing: Crossing) -> Packed:
        """The output without gradients; a recording with a backward pass serves as well as one without."""
        with torch.inference_mode(False):
            own = [t.clone() if t.is_inference() else t for t in tensors]
            floating = [t.is_floating_point() for t in own]
            kind = self._kind(own, floating, crossing)
            known = self._engine.known((kind, self._engine.given.get(kind))) is not None
            return self.record(own, floating if known else [False] * len(own), crossing).output

    def record(self, tensors: Sequence[Tensor], needs: Sequence[bool], crossing: Crossing) -> Tape:
        """Replay the forward pass, after recording it if this kind of call is new."""
        engine = self._engine
        kind = self._kind(tensors, needs, crossing)
        if kind is None or engine.name == "eager" or engine.recorder.busy():
            return super().record(tensors, needs, crossing)
        with engine.turn():
            key = kind, engine.given.get(kind)
            recording, record = engine.known(key), partial(self._recorded, tensors, needs, crossing, key[1])
            failure: Exception | None = None
            if engine.wants_compiled(recording) and (recording is not None or engine.takes()):
                compiled, failure = self._try(record, compiled=True)
                if failure is not None and not is_out_of_memory(failure):
                    engine.give_up_compiling(failure)
                recording = self._kept(key, compiled) or engine.known(key)
            if recording is None and engine.takes():
                recording, failure = self._try(record, compiled=False)
                self._kept(key, recording)
            if recording is not None:
                return ReplayTape(engine, kind, recording, tensors)
        tape = super().record(tensors, needs, crossing)  # the model's own error is raised here, as it is
        if failure is not None and not is_out_of_memory(failure):  # which says nothing of the next time
            engine.give_up(failure)
        return tape

    def _kept(self, key: Any, recording: Recording | None) -> Recording | None:
        if recording is not None:
            self._engine.keep(key, recording)
        return recording

    def _try(self, record: Callable[..., Recording], *, compiled: bool) -> tuple[Recording | None, Exception | None]:
        """A recording, or why there is none."""
        try:
            return record(compiled=compiled), None
        except UnbalancedFoldError:
            raise
        except Exception as error:
            return None, error.with_traceback(None)  # which holds all that the recording had made

    def _recorded(
        self,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        crossing: Crossing,
        given: Given | None,
        *,
        compiled: bool,
    ) -> Recording:
        engine = self._engine
        engine.held = None  # recording may run the work
        device = engine.precision.device
        try:
            with (
                crossing.state.kept(),
                random_state_kept(device),
                memory_kept(engine.network),
                refuse_what_changes(engine.network),
                unhooked(),
            ):
                runner = engine.recorded(compiled=compiled)
                run = runner.bind(self._arguments.holding([]))  # without the first batch, and what it came from
                recording = Recording(run, tensors, needs, crossing, engine.recorder, given=given)
                recording.compiled = runner.name == "compile"  # it may have given up meanwhile
                return recording
        except BaseException:
            engine.recorder.start_anew()  # a graph that was made may have been the only one in its memory
            raise

    def _kind(self, tensors: Sequence[Tensor], needs: Sequence[bool], crossing: Crossing) -> Any:
        constants, device = self._arguments.constants, self._engine.precision.device
        # A recording would keep the value of a number that lies on the host.
        if constants is None or any(t.numel() == 0 or t.device != device for t in tensors):
            return None
        return crossing, constants, tuple(needs), tuple((t.shape, t.dtype) for t in tensors)


class ReplayTape:
    """One forward pass, as long as no other has overwritten it; see :class:`fastadv_adapters.boundary.Tape`."""

    def __init__(self, engine: ReplayEngine, kind: Any, recording: Recording, tensors: Sequence[Tensor]) -> None:
        self._engine, self._kind, self._recording = engine, kind, recording
        self._own = engine.held = object()
        self.output = recording.forward(tensors)
        self.differentiable = recording.differentiable

    def pull(self, grads: Sequence[Tensor | None], *, keep: bool) -> Pulled | None:
        """The backward pass; None if another pass used the memory, or the caller records this one himself.

        Likewise if gradients come in at other outputs than it was recorded for: the next recording is for these.
        """
        if self._engine.recorder.busy():
            return None
        given = tuple(g is not None and own for g, own in zip(grads, self.differentiable, strict=True))
        with self._engine.turn():
            self._engine.given[self._kind] = None if given == tuple(self.differentiable) else given
            if self._engine.held is not self._own or given != self._recording.given:
                return None
            self._engine.held = None  # a recorded backward pass reuses the memory of what it has read
            return self._recording.backward(grads)
