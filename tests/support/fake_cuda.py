"""What PyTorch keeps of CUDA captures, by its sources: pools, streams, events, the generator, cuBLAS workspaces."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

Pool = tuple[int, int]


class FakeCuda:
    """The device of a test.

    Args:
        ends_itself: whether a capture that breaks ends its allocations, as from PyTorch 2.12 on.
        streams: how many streams there are before they come again.

    Attributes:
        routed: pools that allocations go to.
        uses: how many graphs hold each pool.
        stuck: whether the generator waits for the end of a capture: then it raises at a draw, and any replay does.
        breaks: whether a capture that goes on now is invalid.
        cleared: how often all workspaces were cleared.
        log: what streams, events and caches were asked to do.
    """

    def __init__(self, *, ends_itself: bool = False, streams: int = 32) -> None:
        self.ends_itself, self.breaks, self.stuck = ends_itself, False, False
        self.capturing: FakeGraph | None = None
        self.routed: set[Pool] = set()
        self.uses: Counter[Pool] = Counter()
        self.dead: set[Pool] = set()
        self.cleared = 0
        self.log: list[tuple[Any, ...]] = []
        self._pools = itertools.count(1)
        self._streams = itertools.cycle(range(1, streams + 1))
        self._current = threading.local()

    def graph_pool_handle(self) -> Pool:
        return 0, next(self._pools)

    def hold(self, pool: Pool) -> None:
        assert pool not in self.dead, "use_count > 0 INTERNAL ASSERT FAILED"
        if pool in self.routed:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.uses[pool] += 1
        self.routed.add(pool)

    def end(self, device: int, pool: Pool) -> None:
        if pool not in self.routed:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.routed.remove(pool)

    def release(self, device: int, pool: Pool) -> None:
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0, "uc >= 0 INTERNAL ASSERT FAILED"
        if not self.uses[pool]:
            self.dead.add(pool)

    def stream(self, device: Any = None, priority: int = 0) -> "FakeStream":
        return FakeStream(self, next(self._streams))

    def current_stream(self) -> "FakeStream":
        return getattr(self._current, "stream", None) or FakeStream(self, 0)

    @contextmanager
    def on(self, stream: "FakeStream") -> Iterator[None]:
        before, self._current.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._current.stream = before

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def clear(self) -> None:
        self.cleared += 1

    def wait_for_all(self) -> None:
        raise AssertionError("waiting for the device breaks other captures")

    def empty_cache(self) -> None:
        assert self.capturing is None
        self.log.append(("empty",))

    def install(self, patch: pytest.MonkeyPatch, end: str = "_cuda_endAllocateToPool") -> None:
        """Put it in the place of ``torch.cuda``; ``end`` is what ends allocations by hand in this version."""
        empty = torch.empty
        patch.setattr(torch, "empty", lambda *args, device=None, **kwargs: empty(*args, **kwargs))
        fakes: dict[str, Any] = {
            "CUDAGraph": lambda: FakeGraph(self),
            "Event": lambda: FakeEvent(self),
            "Stream": self.stream,
            "stream": self.on,
            "device": self.device,
            "current_stream": self.current_stream,
            "current_device": lambda: 0,
            "synchronize": self.wait_for_all,
            "empty_cache": self.empty_cache,
            "graph_pool_handle": self.graph_pool_handle,
            "is_current_stream_capturing": lambda: self.capturing is not None,
        }
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):
            patch.delattr(torch._C, name, raising=False)
        patch.setattr(torch._C, end, self.end, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear, raising=False)


class FakeStream:
    """A stream; two with one handle are the same."""

    def __init__(self, cuda: FakeCuda, handle: int) -> None:
        self._cuda, self.cuda_stream = cuda, handle

    def wait_stream(self, other: "FakeStream") -> None:
        self._cuda.log.append(("wait", self.cuda_stream, other.cuda_stream))

    def wait_event(self, event: "FakeEvent") -> None:
        assert event.after >= 0
        self._cuda.log.append(("after", self.cuda_stream, event.after))


class FakeEvent:
    """An event, which knows where it was recorded last."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda, self.after = cuda, -1

    def record(self, stream: FakeStream) -> None:
        self.after = stream.cuda_stream


class FakeGraph:
    """A graph: what it does to allocator and generator, and what it leaves where its capture breaks."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda, self._pool, self._ended = cuda, (0, 0), False

    def capture_begin(self, pool: Pool | None = None, capture_error_mode: str = "global") -> None:
        assert self._cuda.capturing is None, "one capture at a time"
        assert capture_error_mode == "thread_local"
        self._pool = pool or self._cuda.graph_pool_handle()
        self._cuda.hold(self._pool)
        self._cuda.capturing, self._cuda.stuck = self, True

    def capture_end(self) -> None:
        cuda = self._cuda
        assert cuda.capturing is self
        cuda.capturing = None
        if cuda.breaks:
            cuda.breaks = False
            if cuda.ends_itself:
                cuda.routed.remove(self._pool)
                cuda.stuck = False
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        cuda.routed.remove(self._pool)
        cuda.stuck, self._ended = False, True

    def replay(self) -> None:
        if self._cuda.stuck:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def __del__(self) -> None:
        if self._ended:
            self._cuda.release(0, self._pool)


def breaking(cuda: FakeCuda) -> Callable[[], None]:
    """Work that no capture survives."""

    def work() -> None:
        cuda.breaks = True
        raise RuntimeError("operation not permitted when stream is capturing")

    return work
