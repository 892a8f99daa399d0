"""What a batch norm subclass computes, from a trace of its own forward."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..modules import clone, copy_module
from .tracer import TRACING, Tracer


@dataclass
class OwnForward:
    """What a batch norm subclass computes.

    Attributes:
        graph: of its own forward.
        norm: the batch norm in it.
        left: once it has been written, the code of what is left of the forward when the batch norm is folded (False)
            or frozen (True). Norms that are alike share it: it is given the norm as ``self``.
    """

    graph: fx.Graph
    norm: fx.Node
    left: dict[bool, Callable[..., Any]] = field(default_factory=dict)


class Alike:
    """What has been traced so far; norms that are alike are traced once."""

    def __init__(self) -> None:
        self._traced: list[tuple[Any, OwnForward | str]] = []

    def find(self, norm: nn.Module) -> OwnForward | str:
        """As :func:`trace_own`, or what is wrong: a text, for an exception would keep alive what raised it."""
        looks = _looks(norm)
        found = next((found for other, found in self._traced if _same(other, looks)), None)
        if found is None:
            try:
                found = trace_own(norm)
            except ValueError as error:
                found = str(error)
            self._traced.append((looks, found))
        return found


def trace_own(module: nn.Module) -> OwnForward:
    """Trace a batch norm subclass's own forward, on a throw-away copy.

    Raises:
        ValueError: the forward does not trace, or is not one batch norm with running statistics and something around.
    """
    copied = copy_module(module, clone)
    copied._check_input_dim = lambda input: None  # type: ignore[assignment]  # looks at the shape, which a trace has not
    try:
        with TRACING:
            graph = Tracer(leaves=lambda m: True, sized=False).trace(copied)
    except Exception as error:
        raise ValueError(f"its own forward does not trace ({type(error).__name__})") from error
    nodes = [n for n in graph.nodes if n.target is nn.functional.batch_norm]
    if len(nodes) != 1 or not _uses_running_statistics(nodes[0], module):
        raise ValueError("its own forward is not one batch norm with running statistics")
    own = {*module._parameters, *module._buffers}
    if any(node.op == "get_attr" and node.target not in own for node in graph.nodes):
        raise ValueError("its own forward reads tensors that are neither parameters nor buffers of its own")
    batch_norm_input(nodes[0])
    return OwnForward(graph, nodes[0])


def _looks(norm: nn.Module) -> list[Any]:
    """All that a trace of a module might depend on: everything but the values of its tensors."""
    tensors = ("_parameters", "_buffers")
    return [
        (
            name,
            type(part),
            {key: value for key, value in vars(part).items() if key not in (*tensors, "_modules")},
            [(key, value is None) for held in tensors for key, value in vars(part)[held].items()],
        )
        for name, part in norm.named_modules(remove_duplicate=False)
    ]


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # tensors or arrays in attributes: another one
        return False


def batch_norm_input(node: fx.Node) -> fx.Node:
    """What a call of ``torch.nn.functional.batch_norm`` normalises."""
    source = node.args[0] if node.args else node.kwargs["input"]
    if not isinstance(source, fx.Node):
        raise ValueError(f"expected a batch norm of something computed, got one of {source!r}")
    return source


def _uses_running_statistics(node: fx.Node, module: nn.Module) -> bool:
    """Whether the arguments are just the module's own weight, bias, running statistics and eps, in eval mode."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    read = {name: given.get(name) for name in names[1:5]}
    own = all(v is None or (isinstance(v, fx.Node) and v.op == "get_attr" and v.target == n) for n, v in read.items())
    same_eps = given.get("eps", 1e-5) == module.eps
    return own and same_eps and read["running_mean"] is not None and not given.get("training")
