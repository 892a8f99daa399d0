"""What a batch norm subclass computes around its batch norm, from a trace of its own forward.

The trace only tells whether the batch norm can be taken out. The subclass's own code is what runs.
"""

import warnings
from typing import Any

import torch
from torch import fx, nn

from ..modules import are_equal, clone, copy_module, device_of, random_state_kept
from .tracer import Tracer, tracing

ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
"""Of ``torch.nn.functional.batch_norm``, in their order."""

_ASKS = ("ndim", "shape", "dtype", "device", "dim", "size", "numel", "is_floating_point", "is_cuda")
"""Attributes and methods of a tensor that say nothing of its values."""


class Alike:
    """What has been traced so far; norms that are alike are traced once."""

    def __init__(self) -> None:
        self._traced: list[tuple[Any, bool | str]] = []

    def find(self, norm: nn.Module) -> bool | str:
        """As :func:`reads_first`, or what is wrong: a text, for an exception would keep alive what raised it."""
        looks = _looks(norm)
        found = next((found for other, found in self._traced if are_equal(other, looks)), None)
        if found is None:
            try:
                with random_state_kept(device_of(norm)), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = reads_first(norm)
            except ValueError as error:
                found = str(error)
            self._traced.append((looks, found))
        return found


def reads_first(module: nn.Module) -> bool:
    """Whether a subclass's batch norm comes first in its forward, which reads its input nowhere else.

    Raises:
        ValueError: the forward does not trace, or is not one batch norm with running statistics and something around.
    """
    copied = copy_module(module, clone)
    copied._check_input_dim = lambda input: None  # type: ignore[assignment]  # looks at the shape, which a trace has not
    try:
        with tracing(copied):
            graph = Tracer(leaves=lambda m: True, sized=False).trace(copied)
    except Exception as error:
        raise ValueError(f"its own forward does not trace ({type(error).__name__})") from error
    nodes = [n for n in graph.nodes if n.target is nn.functional.batch_norm]
    if len(nodes) != 1 or not _uses_running_statistics(nodes[0], module):
        raise ValueError("its own forward is not one batch norm with running statistics")
    own = {*module._parameters, *module._buffers}
    if any(node.op == "get_attr" and node.target not in own for node in graph.nodes):
        raise ValueError("its own forward reads tensors that are neither parameters nor buffers of its own")
    if any(user is not nodes[0] for node in graph.nodes if node.target in ARGUMENTS[1:5] for user in node.users):
        raise ValueError("its own forward does more with the batch norm's tensors than the batch norm")
    source = nodes[0].args[0] if nodes[0].args else nodes[0].kwargs["input"]
    if not isinstance(source, fx.Node):
        raise ValueError(f"expected a batch norm of something computed, got one of {source!r}")
    read = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    return read == [source] and all(user is nodes[0] or _only_asks(user) for user in source.users)


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


def _only_asks(node: fx.Node) -> bool:
    """Whether this depends on nothing of a tensor but its shape and kind."""
    name = node.args[1] if node.target is getattr else node.target if node.op == "call_method" else None
    return name in _ASKS or node.target is torch._assert


def _uses_running_statistics(node: fx.Node, module: nn.Module) -> bool:
    """Whether the arguments are just the module's own weight, bias, running statistics and eps, in eval mode."""
    given = dict(zip(ARGUMENTS, node.args, strict=False)) | node.kwargs
    read = {name: given.get(name) for name in ARGUMENTS[1:5]}
    own = all(v is None or (isinstance(v, fx.Node) and v.op == "get_attr" and v.target == n) for n, v in read.items())
    same_eps = given.get("eps", 1e-5) == module.eps
    return own and same_eps and read["running_mean"] is not None and not given.get("training")
