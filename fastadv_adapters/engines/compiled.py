"""The engine that compiles the fast network with ``torch.compile``; the boundary stays outside."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..boundary import Crossing, Packed, Pulled, UnbalancedFoldError
from ..modules import Precision, RunBy, is_out_of_memory
from .eager import EagerEngine, EagerRun, EagerTape

MOST = 16
"""How many kinds of calls (shapes, flags) are compiled; others run eager."""

BACKEND = "inductor"


class GiveUp(Protocol):
    """Is told that an engine cannot run a network."""

    def __call__(self, reason: str, runs: RunBy = "eager") -> None:
        """Take down why, and what runs it from now on."""


class CompileEngine(EagerEngine):
    """Run the network as ``torch.compile`` makes it: one compilation per shape of the inputs.

    Weights are inputs of the compiled code, so that an update in place changes nothing about it.

    Args:
        network, precision, around: as of :class:`EagerEngine`; ``around`` stays outside of the compiled code.
        give_up: told why, once, if the network cannot be compiled; then everything runs eager.
    """

    def __init__(
        self,
        network: nn.Module,
        precision: Precision,
        *,
        around: Callable[[], AbstractContextManager[None]],
        give_up: GiveUp,
    ) -> None:
        super().__init__(network, precision, convert=True, around=around)
        self.name = "compile"
        self._give_up = give_up
        call = _with_code_of_its_own(lambda *args, **kwargs: network(*args, **kwargs))
        self._compiled: Callable[..., Any] = torch.compile(call, dynamic=False, fullgraph=True, backend=BACKEND)
        self._kinds: set[Any] = set()

    def bind(self, arguments: Packed) -> "CompiledRun":
        """The run for one call."""
        return CompiledRun(self, arguments)

    def enter(self, tensor: Tensor) -> Tensor:
        """An input as the network wants it, dense: other strides would be another compilation."""
        entered = super().enter(tensor)
        wanted = self.precision.memory_format(entered.ndim, spatial=entered.is_floating_point())
        strides = torch.empty(entered.shape, device="meta", memory_format=wanted).stride()
        if entered.stride() == strides:
            return entered
        return entered.new_empty_strided(entered.shape, strides).copy_(entered)  # not contiguous(): it keeps some

    def takes(self, kind: Any) -> bool:
        """Whether calls of this kind run compiled."""
        return self.name == "compile" and (kind in self._kinds or len(self._kinds) < MOST)

    def compiled(self, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The compiled network; compiles at the first call of a kind."""
        with _room_for_more(), nullcontext() if kind in self._kinds else _silence():
            output = self._compiled(*args, **kwargs)
        self._kinds.add(kind)
        return output

    def give_up(self, error: Exception) -> None:
        """Run eager from now on."""
        self.name = "eager"
        self._give_up(f"torch.compile raised {type(error).__name__}: {_first_line(error)}")


class CompiledRun(EagerRun):
    """One call of a :class:`CompileEngine`."""

    _engine: CompileEngine
    looked_at = False

    def __call__(self, tensors: Sequence[Tensor]) -> Packed:
        """The network alone; always with a graph, so that there is one compilation and not two per shape."""
        engine, arguments = self._engine, self._arguments
        kind = (arguments.kind, arguments.constants, tuple((t.shape, t.dtype, t.requires_grad) for t in tensors))
        if not engine.takes(kind):
            return super().__call__(tensors)
        args, kwargs = arguments.rebuild(list(map(engine.enter, tensors)))
        try:
            with engine.precision.context(), engine.around():
                return Packed(engine.compiled(kind, args, kwargs))
        except UnbalancedFoldError:
            raise
        except Exception as error:
            output = super().__call__(tensors)  # the model's own error is raised here, as it is
            if not is_out_of_memory(error):  # which says nothing of the next time
                engine.give_up(error)
            return output

    def record(self, tensors: Sequence[Tensor], needs: Sequence[bool], crossing: Crossing) -> "CompiledTape":
        """Run with a graph."""
        return CompiledTape(self, tensors, needs, crossing)

    def values(self, tensors: Sequence[Tensor], crossing: Crossing) -> Packed:
        """The output without gradients, of the same compiled code as with them."""
        with torch.inference_mode(False):
            own = [t.clone() if t.is_inference() else t for t in tensors]
            return EagerTape(self, own, [t.is_floating_point() for t in own], crossing).output


class CompiledTape(EagerTape):
    """As the eager one; the code of a backward pass is made when it first runs, and for passes that may be several."""

    def pull(self, grads: Sequence[Tensor | None], *, keep: bool) -> Pulled:
        """The backward pass."""
        with _room_for_more():
            return super().pull(grads, keep=keep)


def _with_code_of_its_own(function: Any) -> Callable[..., Any]:
    """The same function; what the compiler has given up for the code that another network runs does not concern it."""
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


@contextmanager
def _room_for_more() -> Iterator[None]:
    """Let torch.compile keep as many compilations as are made here, whose code several backward passes may run."""
    import torch._dynamo
    import torch._functorch.config as functorch

    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # up to 2.6
    # The other limit is on all compilations of one code: that of nn.Sequential serves many models.
    limits = {limit: 1024, f"accumulated_{limit}": 2**20}
    with torch._dynamo.config.patch(limits), functorch.patch(donated_buffer=False):
        yield


@contextmanager
def _silence() -> Iterator[None]:
    """While it compiles, it warns of its own doings (that it reads ``.grad`` of our inputs); nobody can change them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else "no reason given"
