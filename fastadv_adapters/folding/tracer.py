"""A tracer that goes on if a module's forward does not trace."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..modules import first_line, has_hooks, put_back

_TRACING = threading.RLock()
"""While torch.fx traces, it patches nn.Module for all threads, and warnings are off for all: one trace at a time."""


@contextmanager
def tracing(module: nn.Module) -> Iterator[None]:
    """Traces of a module are made inside; no proxy stays where its code keeps tensors for all models of its class."""
    with _TRACING, put_back(module, lambda value: isinstance(value, fx.Proxy) and isinstance(value.tracer, Tracer)):
        yield


class _Sized(fx.Proxy):
    """A proxy with a length, which models ask for in ``view(len(x), -1)``; for a trace that is read, and never run."""

    def __len__(self) -> int:
        return 2


class Tracer(fx.Tracer):
    """A tracer that goes on where a module's forward does not trace, with that module as a leaf.

    So are modules with hooks: a hook is the user's, and is not to be handed what stands for a value. What other
    threads do meanwhile goes on as ever.

    Args:
        leaves: which modules are not traced into; None for :func:`is_leaf`.
        sized: whether values have a length while tracing, for a trace that is never run.

    Attributes:
        failed: name of each module that does not trace -> why.
        hooked: names of the modules with hooks, to be traced by themselves.
    """

    proxy_buffer_attributes = True

    def __init__(self, leaves: Callable[[nn.Module], bool] | None = None, *, sized: bool = True) -> None:
        super().__init__()
        self._leaves, self._sized = leaves or is_leaf, sized
        self.failed: dict[str, str] = {}
        self.hooked: dict[str, None] = {}
        self._thread = threading.get_ident()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a value while tracing."""
        return _Sized(node, self) if self._sized else fx.Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the call of this module stays one node."""
        return self._leaves(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into a module; if that fails, forget the attempt and record one opaque call."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if not self._leaves(m) and has_hooks(m):
            self.hooked[name] = None
        elif not self._leaves(m):
            last = next(iter(reversed(self.graph.nodes)), None)  # a list in PyTorch 2.11 and older
            try:
                return forward(*args, **kwargs)
            except Exception as error:
                self.failed[name] = first_line(error)
                self._forget_after(last)
        return self.create_proxy("call_module", name, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """What stands for an attribute of a module."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _forget_after(self, last: fx.Node | None) -> None:
        for node in reversed(self.graph.nodes):
            if node is last:
                return
            self.graph.erase_node(node)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is looked at from outside only: PyTorch's own, and all that derives from layers that fold."""
    if isinstance(module, (_BatchNorm, _ConvNd, nn.Linear)):
        return True
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
