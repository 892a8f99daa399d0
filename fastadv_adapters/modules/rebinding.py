"""Functions and weak references that reach the original of a copy, made to reach the copy."""

import copy
import functools
import types
import weakref
from typing import Any

from torch import nn

from .classes import inside_of, is_bound_as_it_was, is_data


def rebind_forward(part: nn.Module, copied: nn.Module, memo: dict[int, Any]) -> None:
    """Have a forward that is set on an instance run on the copy; drop it if it is the one of its class.

    Args:
        part: of the original.
        copied: what it became.
        memo: of the deep copy, which has been made.
    """
    if "forward" not in vars(part) or inside_of(part) is not None:
        return
    vars(copied)["forward"] = _rebound(vars(part)["forward"], memo)
    if is_bound_as_it_was(copied):
        del vars(copied)["forward"]


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """What this is in the copy: functions with the modules that they have enclosed, which a deep copy leaves alone."""
    if isinstance(value, functools.partial):
        arguments = [_rebound(argument, memo) for argument in value.args]
        return functools.partial(
            _rebound(value.func, memo), *arguments, **{key: _rebound(v, memo) for key, v in value.keywords.items()}
        )
    if isinstance(value, types.MethodType):
        return types.MethodType(_rebound(value.__func__, memo), copy.deepcopy(value.__self__, memo))
    if not isinstance(value, types.FunctionType):
        return copy.deepcopy(value, memo)
    if id(value) in memo:
        return memo[id(value)]
    if "_torchdynamo_orig_callable" in vars(value):  # by torch.compile; the copy runs what was compiled
        return _rebound(vars(value)["_torchdynamo_orig_callable"], memo)
    return _with_cells(value, memo) if value.__closure__ else value


def _with_cells(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    cells = function.__closure__ or ()
    own = [types.CellType() if _reaches(cell, memo) else cell for cell in cells]
    if all(ours is theirs for ours, theirs in zip(own, cells, strict=True)):
        return function
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(own)
    )
    made.__kwdefaults__ = function.__kwdefaults__
    memo[id(function)] = made  # first: it may enclose itself
    for ours, theirs in zip(own, cells, strict=True):
        if ours is not theirs:
            ours.cell_contents = _rebound(theirs.cell_contents, memo)
    return made


def _reaches(cell: types.CellType, memo: dict[int, Any]) -> bool:
    """Whether a cell holds a copied module, or a function, which may; other objects stay the caller's."""
    try:
        value = cell.cell_contents
    except ValueError:
        return False
    if isinstance(value, types.MethodType):
        value = value.__self__
    if isinstance(value, nn.Module):
        return id(value) in memo
    return isinstance(value, (types.FunctionType, functools.partial))


def redirect_references(parts: list[tuple[nn.Module, nn.Module]]) -> None:
    """Have weak references to parts of the original refer to their copies, in attributes and containers there.

    Args:
        parts: each part of the original, and what it became.
    """
    copies = {id(part): copied for part, copied in parts}
    seen = set(map(id, copies.values()))
    for _, copied in parts:
        _redirect(vars(copied), copies, seen)


def _redirect(held: Any, copies: dict[int, nn.Module], seen: set[int]) -> None:
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, (dict, list)):
        for key, value in list(held.items() if isinstance(held, dict) else enumerate(held)):
            if type(value) is weakref.ref and id(value()) in copies:
                held[key] = weakref.ref(copies[id(value())])
            else:
                _redirect(value, copies, seen)
    elif isinstance(held, (tuple, set)):
        for value in held:
            _redirect(value, copies, seen)
    elif not isinstance(held, nn.Module) and is_data(held):
        _redirect(vars(held), copies, seen)
