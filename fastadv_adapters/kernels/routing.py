"""Operators that a module's own code calls, run by faster or wider ones inside that module and its parts.

The user's code is not changed. Inside the forward of a module whose code names such an operator a
``TorchFunctionMode`` looks at each call, hands those on to the other operator and all others to PyTorch. A mode is of
this thread and of this call, so nothing is left behind, and a checkpoint that runs the module again finds it again.
A call costs more there. So for faster operators only modules with few parts are chosen.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..modules import Precision, become, functions_in, kind_of, modules_of, names_in, runs_compiled
from .attention import attend
from .by_function import DEPTHWISE, may_call
from .multi_head import multi_head
from .narrow import NARROW
from .pooling import adaptive_average, mean
from .prepared import SWITCHES
from .widening import NAMES, WIDER, WIDER_IN_FLOAT16

MOST = 16
"""A module with more parts, itself included, calls too many other operators: a whole network, say."""

LEAST = 2**16
"""Of images with fewer entries the gradient of a mean takes less time than a look at each call."""

_AT_FIRST = ("__init__", "reset_parameters", "extra_repr", "_init_weights", "init_weights")  # run in no pass

_Operator = Callable[..., Any]

_ATTENTION: dict[_Operator, _Operator] = {
    F.scaled_dot_product_attention: attend,
    F.multi_head_attention_forward: multi_head(attend),
}
_MEANS: dict[_Operator, _Operator] = {
    torch.Tensor.mean: mean,
    torch.mean: mean,
    F.adaptive_avg_pool2d: adaptive_average,
}


def route(network: nn.Module, precision: Precision) -> None:
    """Have the modules of a copied network run other operators, if their code names slow or coarse ones."""
    faster, wider = _faster(precision), _wider(precision)
    slow, convolutions = ({operator.__name__ for operator in some} for some in (faster, DEPTHWISE))
    coarse = {*NAMES, *(operator.__name__ for operator in wider)} if wider else set()
    parts = [(part, kind_of(part)) for part in modules_of(network)]
    code = {kind: _named_by(kind) for kind in {kind for _, kind in parts}}
    with_checkpoints = {kind for kind, names in code.items() if any("checkpoint" in name for name in names)}
    compiled = runs_compiled(network)
    for part, kind in parts:
        names = code[kind] & (slow | coarse) - (set() if may_call(part) else convolutions)
        if (
            kind in with_checkpoints
            or part in compiled
            or not names
            or not (names := names.difference(*_attributes_of(part, kind)))
        ):
            continue
        inside = [kind_of(one) for one in modules_of(part)]
        few = len(inside) <= MOST and names & slow
        wide = names & coarse and with_checkpoints.isdisjoint(inside)
        if few or wide:
            become(part, _Routed)
            only_means = names & slow <= {operator.__name__ for operator in _MEANS}
            vars(part).update(faster=faster if few else {}, wider=wider if wide else {}, only_means=only_means)


def _attributes_of(part: nn.Module, kind: type[nn.Module]) -> tuple[Iterable[str], ...]:
    """Names that mean the module's own attributes, rather than PyTorch's operators."""
    return vars(part), part._modules, part._parameters, part._buffers, dir(kind)


def _faster(precision: Precision) -> dict[_Operator, _Operator]:
    """What is run in the place of what."""
    found: dict[_Operator, _Operator] = {}
    if precision.device.type == "cpu":
        found |= _MEANS if precision.channels_last else {}
        found |= _ATTENTION | DEPTHWISE if precision.dtype == torch.bfloat16 else {}
    if precision.half and SWITCHES.on(precision.device).narrow_norms:
        found |= NARROW
    return found


def _wider(precision: Precision) -> dict[_Operator, _Operator]:
    """What is run in the place of what where half precision serves it badly."""
    if not precision.half or precision.device.type != "cpu":
        return {}
    return WIDER | WIDER_IN_FLOAT16 if precision.dtype == torch.float16 else WIDER


class _Mode(TorchFunctionMode):
    def __init__(self, operators: dict[_Operator, _Operator]) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._operators.get(function, function)(*args, **(kwargs or {}))


class _Routed:
    """Mixin for a module in whose forward other operators are run.

    Attributes:
        faster: what is run in the place of what because it is faster.
        wider: likewise because it is more exact.
        only_means: whether of the faster ones the module names none but means.
    """

    faster: dict[_Operator, _Operator]
    wider: dict[_Operator, _Operator]
    only_means: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module. A compiler chooses operators by itself, and without gradients PyTorch has fused modules."""
        pays = torch.is_grad_enabled() and not (self.only_means and args and _is_small(args[0]))
        operators = {**self.wider, **self.faster} if pays else self.wider
        if torch.compiler.is_compiling() or not operators:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with _Mode(operators):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _is_small(input: Any) -> bool:
    return isinstance(input, torch.Tensor) and input.numel() < LEAST


def _named_by(kind: type[nn.Module]) -> set[str]:
    """Names in the code of a class, as far as that runs in a pass and is not that of every module."""
    items = [item for base in kind.__mro__ if base is not nn.Module for item in vars(base).items()]
    functions = [function for name, item in items if name not in _AT_FIRST for function in functions_in(item)]
    return {name for function in functions for name in names_in(function.__code__)}
