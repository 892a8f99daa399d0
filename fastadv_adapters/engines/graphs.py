"""Recording on CUDA, as CUDA graphs: all launches of a pass are given to the device as one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor

from .captures import ALONE, capture
from .waiting import refuse_what_waits

_WARM_UPS = 3  # as many as PyTorch's own make_graphed_callables makes


class CudaRecorder:
    """Records into CUDA graphs that share one memory pool; see :class:`fastadv_adapters.engines.recording.Recorder`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._aside = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()  # and no stream: that one may be gone, or capturing, when it is waited for
        self._used = False
        self.start_anew()

    def start_anew(self) -> None:
        """A new pool: one whose graphs are gone, or one of whose captures broke, takes no others."""
        self._pool = torch.cuda.graph_pool_handle()
        # Nothing else is to run on it, so that cuBLAS has no workspace for it yet. PyTorch hands out 32 streams of each
        # priority in turn; those of the usual one may be anybody's.
        self._stream = torch.cuda.Stream(self._device, priority=-1)

    def busy(self) -> bool:
        """Whether the caller is capturing a graph of his own."""
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """On the model's device, after what was replayed last, also where that was on another stream."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            if self._used:
                current.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(current)
                self._used = True

    def uses(self, tensors: Sequence[Tensor]) -> None:
        """Have the memory wait for the current stream, should the tensors be dropped before it is done."""
        current = torch.cuda.current_stream()
        for tensor in tensors:
            tensor.record_stream(current)

    def warm(self, work: Callable[[], object], *, looks: bool) -> None:
        """Run the work a few times on a stream of its own, while cuDNN looks for its fastest kernels."""
        current = torch.cuda.current_stream()
        with ALONE:
            self._aside.wait_stream(current)
            try:
                with torch.cuda.stream(self._aside), _as_recorded():
                    for _ in range(_WARM_UPS - 1):
                        work()
                    with refuse_what_waits(self._device) if looks else nullcontext():
                        work()
            finally:
                current.wait_stream(self._aside)
            # What the passes left in the cache serves no other stream, and a capture cannot have it freed when it runs
            # short. This may break a capture of the caller's in another thread that minds what all threads do
            # ("global"), as may any allocation. Up to PyTorch 2.11 it raises while others capture: then it stays.
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """Record the work; other threads may go on using the device meanwhile."""
        with ALONE, _as_recorded():
            try:
                return capture(work, stream=self._stream, pool=self._pool)
            except BaseException:
                self.start_anew()
                raise


@contextmanager
def _as_recorded() -> Iterator[None]:
    """``cudnn.benchmark`` for this block, unless the user wants determinism; for one shape it pays at once.

    Backward passes run in this thread: the device's own may wait for a lock that this one holds.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = before or not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled())
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        cudnn.benchmark = before
