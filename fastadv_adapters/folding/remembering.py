"""Which modules keep what they compute from their weights alone, and how their operators are seen."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from ..modules import Precision, become, buffers_of, kind_of, modules_of, parameters_of, runs_compiled
from .memo import Memo

MOST = 16
"""A module with more parts, itself included, calls too many other operators, each of which costs more here."""

_PASSES = 2
"""A module that has used nothing that is kept in so many passes runs without a look at its operators."""


class _Mode(TorchFunctionMode):
    """Looks at the operators of one call of a module."""

    def __init__(self, memo: Memo) -> None:
        super().__init__()
        self._memo, self.pays, self._given = memo, False, set[Any]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, kept = self._memo.run(function, args, kwargs or {}, self._given)
        self.pays |= kept
        return result


class _Use:
    """How many passes of one module have used nothing that is kept since one did; no attribute of it changes."""

    def __init__(self, memo: Memo) -> None:
        self.memo, self.passes_without = memo, 0


class Remembering:
    """Mixin for a module that computes something from its weights alone, or may."""

    use_of_memo: _Use

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, hooks included. A compiler sees by itself what stands still."""
        use = self.use_of_memo
        if use.passes_without >= _PASSES or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with use.memo.staged(), _Mode(use.memo) as mode:
            result = super().__call__(*args, **kwargs)  # type: ignore[misc]
        use.passes_without = 0 if mode.pays else use.passes_without + 1
        return result


def remember(network: nn.Module, precision: Precision) -> Memo | None:
    """Have modules of a copied network keep what they compute from weights alone; None if none has code for that."""
    compiled = runs_compiled(network)
    may = (part for part in modules_of(network) if _may_compute(part) and part not in compiled)
    parts = [part for part in may if len(list(modules_of(part))) <= MOST]
    if not parts:
        return None
    memo = Memo(network, precision)
    for part in parts:
        become(part, Remembering)
        vars(part)["use_of_memo"] = _Use(memo)
    return memo


def _may_compute(part: nn.Module) -> bool:
    """Whether a module has tensors, and code that is not PyTorch's own for its class."""
    if parametrize.is_parametrized(part):
        return True
    if next(parameters_of(part), next(buffers_of(part), None)) is None:
        return False
    return bool(part._forward_pre_hooks) or not kind_of(part).__module__.startswith("torch.")
