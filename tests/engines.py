"""The engines on a machine without CUDA, and a recorder that reuses its buffers as CUDA graphs do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn

from fastadv_adapters import choosing, compiled, networks
from fastadv_adapters.engines import Engine
from fastadv_adapters.precision import Precision
from fastadv_adapters.replay import ReplayEngine


class Rerun:
    """Runs the work again at each replay; what it made before is dropped, as a CUDA graph overwrites it.

    Attributes:
        captured: how many pieces of work were recorded.
        replayed: how many replays there were.
        recording: whether the caller is recording himself.
    """

    reruns = True

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.recording = False

    def busy(self) -> bool:
        return self.recording

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def warm(self, work: Callable[[], object]) -> None:
        work()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        self.captured += 1
        work()

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


def use_engine(patch: pytest.MonkeyPatch, name: str, *, backend: str = "aot_eager") -> None:
    """Have every model whose engine is "auto" run by this one; "cudagraph" by its bookkeeping around :class:`Rerun`.

    Args:
        patch: takes it back.
        name: "eager", "compile" or "cudagraph".
        backend: of ``torch.compile``; "aot_eager" does all but generate code, which takes seconds per model.
    """
    patch.setattr(compiled, "BACKEND", backend)

    def make(asked: str, network: nn.Module, precision: Precision, **callbacks: Any) -> Engine:
        if asked == "auto" and name == "cudagraph":
            return ReplayEngine(network, precision, recorder=Rerun(), **callbacks)
        return choosing.make_engine(name if asked == "auto" else asked, network, precision, **callbacks)  # type: ignore[arg-type]

    patch.setattr(networks, "make_engine", make)
