"""One CUDA graph at a time is captured in this process; a capture that breaks is cleaned up after.

``torch.cuda.graph`` is not used. On entering it waits for the whole device and empties the caches, which breaks a
capture that another thread is making, and it leaves the allocator as it is where a capture breaks.
"""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

ALONE = threading.RLock()
"""Held while any model warms up, captures or replays.

The flags that warming up sets are of the whole process. Up to PyTorch 2.11 so is the generator of a device: while it is
part of one capture, a replay in another thread raises.
"""

_Stream = tuple[int, int]  # device, handle

_broken: list[torch.cuda.CUDAGraph] = []  # the allocators of PyTorch up to 2.11 ask them whether they still capture
_workspaces: dict[_Stream, Any] = {}  # the pool of the last capture on each stream


def capture(work: Callable[[], object], *, stream: torch.cuda.Stream, pool: Any) -> Callable[[], None]:
    """Record the work on the current device, with ``ALONE`` held; other threads may go on using the device meanwhile.

    Args:
        work: what to record.
        stream: to capture on; not the default one, and not one that runs anything else.
        pool: a handle of the pool to allocate from.

    Returns:
        The replay. If the work or the capture raises, the pool must not be used any more.
    """
    with torch.cuda.stream(stream), _garbage_kept():
        _take_workspaces(stream, pool)
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            _run_to_the_end(graph, work)
        except BaseException:
            _clean_up(graph, pool)
            raise

    def replay() -> None:
        with ALONE:
            graph.replay()

    return replay


def _run_to_the_end(graph: torch.cuda.CUDAGraph, work: Callable[[], object]) -> None:
    """Run the work and end the capture; the first error is the one to tell."""
    try:
        work()
    except BaseException:
        with suppress(Exception):
            graph.capture_end()
        raise
    graph.capture_end()


def _clean_up(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Put allocator and generator right: ``capture_end`` raises before it has done so."""
    if _end_allocating(pool):
        _broken.append(graph)
    with suppress(Exception):  # the device may be past help
        _put_generator_right()


def _end_allocating(pool: Any) -> bool:
    """End what the allocator records into the pool, up to PyTorch 2.11; False if the capture has ended it itself."""
    device = torch.cuda.current_device()
    for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):  # the second in 2.6
        end = getattr(torch._C, name, None)
        if end is None:
            continue
        try:
            end(device, pool)
        except RuntimeError:  # not recording: whether the pool is released is then up to the graph
            return False
        torch._C._cuda_releasePool(device, pool)
        return True
    return True  # there is no way to tell


def _put_generator_right() -> None:
    """End the generator's part in the broken capture: up to PyTorch 2.11 a capture that ends well does.

    Until then every draw on the device raises, and every replay of any graph.
    """
    scratch = torch.empty((), device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        _run_to_the_end(graph, scratch.zero_)


def _take_workspaces(stream: torch.cuda.Stream, pool: Any) -> None:
    """See to it that the workspaces of cuBLAS for this stream are, or will be, allocated in this pool.

    A graph keeps their addresses. In its own pool these stay valid as long as the graph, also if somebody clears the
    workspaces: compilers do, and in PyTorch 2.13 every graph that dies, for the stream it was captured on.
    PyTorch hands out the same streams again and again, so a stream may have workspaces in the pool of another model.
    """
    key = (torch.cuda.current_device(), stream.cuda_stream)
    if _workspaces.get(key, pool) != pool:
        torch._C._cuda_clearCublasWorkspaces()
    _workspaces[key] = pool


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Collect no garbage meanwhile: a graph that died in this thread would break the capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
