"""The engines on a machine without CUDA, and a recorder that reuses its buffers as CUDA graphs do."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastadv_adapters.boundary import DeviceState, Engine
from fastadv_adapters.engines import choosing, compiled
from fastadv_adapters.engines.replay import ReplayEngine
from fastadv_adapters.engines.waiting import refuse_what_waits
from fastadv_adapters.kernels import few_channels
from fastadv_adapters.modules.precision import Precision
from fastadv_adapters.networks import fast, pair


class CpuGraph(TorchDispatchMode):
    """Records the operators that run inside, with the tensors they read and wrote, as a CUDA graph records kernels.

    A replay runs no Python code of the network and no autograd: the same operators read and write the same memory.

    Attributes:
        memory: what was allocated inside.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: list[Tensor] = []
        self._steps: list[tuple[Callable[..., Any], Any, Any, list[Tensor | None]]] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        """A compiler that runs inside does not mind, as it does not mind a stream that captures."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(func, args):
            raise RuntimeError(f"{func} waits for the device, which is not permitted when a stream is capturing")
        if any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs))):
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
        output = func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        given = {_address(t) for t in _tensors((args, kwargs))}
        made = [None if _address(t) in given else t.detach() for t in _tensors(output)]
        new = [t for t in made if t is not None]
        if new or (func._schema.is_mutable and torch.Tag.inplace_view not in func.tags):  # a view needs no replay
            self._steps.append((func, args, kwargs, made))
            self.memory += new
        return output

    def replay(self) -> None:
        """Run it all again; results go where the first ones lie."""
        # Recurrent layers keep what a backward pass needs only where gradients are enabled, as they were here.
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, made in self._steps:
                for own, result in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                    if own is not None:
                        own.copy_(result)


class CpuRecorder:
    """Records into :class:`CpuGraph`, with one memory pool for all: a replay leaves nothing in it but its own results.

    Attributes:
        captured: how many pieces of work were recorded.
        replayed: how many replays there were.
        recording: whether the caller is recording himself.
        pools: how many memory pools there were.
        used: addresses outside of the pools that were told to be used.
    """

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.pools = 1
        self.used: list[int] = []
        self.recording = False
        self._left: list[Tensor] = []

    def busy(self) -> bool:
        return self.recording

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def uses(self, tensors: Sequence[Tensor]) -> None:
        self.used += [t.data_ptr() for t in tensors]

    def start_anew(self) -> None:
        self.pools += 1
        self._left = []

    def warm(self, work: Callable[[], object], *, looks: bool) -> None:
        with refuse_what_waits(torch.device("cpu")) if looks else nullcontext():
            work()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        self.captured += 1
        graph = CpuGraph()
        try:
            with graph:
                work()
        finally:
            self._leave(graph.memory)

        def replay() -> None:
            self.replayed += 1
            graph.replay()
            self._leave(graph.memory)

        return replay

    def _leave(self, memory: list[Tensor]) -> None:
        """Overwrite what lies in the pool with NaN, but for this: afterwards, since a backward pass reads a forward's.

        (The device overwrites some of it, and leaves some as it was by chance.)
        """
        if memory is not self._left:
            _spoil(self._left)
        self._left = memory


def _waits(func: Any, args: Any) -> bool:
    """Whether an operator has to know values before it can go on: a branch, or a shape that depends on them."""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _spoil(tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)  # an index is to stay one


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def use_engine(patch: pytest.MonkeyPatch, name: str, *, backend: str = "aot_eager", compile_after: int = 0) -> None:
    """Have every model whose engine is "auto" run by this one; "cudagraph" by a :class:`CpuRecorder`.

    Args:
        patch: takes it back.
        name: "eager", "compile", "cudagraph", or "both": what is recorded is compiled.
        backend: of ``torch.compile``; "aot_eager" does all but generate code, which takes seconds per model.
        compile_after: of the engine that does both.
    """
    patch.setattr(compiled, "BACKEND", backend)

    def make(asked: str, network: nn.Module, precision: Precision, **callbacks: Any) -> Engine:
        if asked == "auto" and name in ("cudagraph", "both"):
            inner = compiled.CompileEngine(
                network, precision, around=callbacks["around"], give_up=partial(callbacks["give_up"], runs="cudagraph")
            )
            more: Any = {"compiled": inner, "compile_after": compile_after} if name == "both" else {}
            return ReplayEngine(network, precision, recorder=CpuRecorder(), **more, **callbacks)
        return choosing.make_engine(name if asked == "auto" else asked, network, precision, **callbacks)  # type: ignore[arg-type]

    patch.setattr(fast, "make_engine", make)
    if name in ("cudagraph", "both"):
        patch.setattr(pair, "state_on", DeviceState)  # what is recorded has to be tensors
        patch.setattr(few_channels, "fits", lambda *_: False)  # for processors, where nothing is recorded
