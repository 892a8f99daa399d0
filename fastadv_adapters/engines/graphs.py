"""Recording on CUDA, as CUDA graphs: all launches of a pass are given to the device as one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_WARM_UPS = 3  # as many as PyTorch's own make_graphed_callables makes


class CudaRecorder:
    """Records into CUDA graphs that share one memory pool; see :class:`fastadv_adapters.replay.Recorder`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._last: torch.cuda.Stream | None = None

    def busy(self) -> bool:
        """Whether the caller is capturing a graph of his own."""
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """On the model's device, after what was replayed last, also where that was on another stream."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            if self._last is not None and self._last != current:
                current.wait_stream(self._last)
            self._last = current
            yield

    def warm(self, work: Callable[[], object]) -> None:
        """Run the work a few times on the stream of the recording, while cuDNN looks for its fastest kernels."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _looking_for_the_fastest(), _backward_in_this_thread():
            for _ in range(_WARM_UPS):
                work()
        current.wait_stream(self._stream)

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """Record the work; other threads may go on using the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        # The outer stream context is left even where the inner one is not: ending a broken capture raises.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            _usable_afterwards(),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            _looking_for_the_fastest(),
            _backward_in_this_thread(),
        ):
            work()
        return graph.replay


@contextmanager
def _usable_afterwards() -> Iterator[None]:
    """A capture that breaks leaves the device's random generator waiting for its end: give it a state of its own."""
    try:
        yield
    except Exception:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise


@contextmanager
def _backward_in_this_thread() -> Iterator[None]:
    """Backward passes run here: the device's own thread may wait for a lock that this thread holds."""
    with torch.autograd.set_multithreading_enabled(False):
        yield


@contextmanager
def _looking_for_the_fastest() -> Iterator[None]:
    """``cudnn.benchmark`` for this block, unless the user wants determinism; for one shape it pays at once."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = before or not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled())
    try:
        yield
    finally:
        cudnn.benchmark = before
