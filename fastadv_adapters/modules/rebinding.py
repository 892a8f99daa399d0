"""Functions that have enclosed the original of a copy, or have it as a default, made to run on the copy.

A deep copy leaves functions alone.
"""

import copy
import functools
import types
from collections import deque
from typing import Any

from torch import nn

from .classes import ATOMS, defaults_of, hooks_of, inside_of, is_bound_as_it_was, is_data, things_of

Memo = dict[int, Any]
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_CONTAINERS = (list, tuple, dict)
_HELD = (list, dict, set, deque)


def rebind(parts: list[tuple[nn.Module, nn.Module]], memo: Memo) -> None:
    """Have functions in attributes, and in containers and objects there, run on the copy; ``forward`` is one of them.

    Args:
        parts: each part of the original, and what it became.
        memo: of the deep copy, which has been made.
    """
    seen = set[int]()
    for part, copied in parts:
        if inside_of(part) is None:
            _rebind_in(things_of(part), vars(copied), memo, seen)
            for kind, hooks in hooks_of(part).items():
                if hooks:
                    _rebind_in(hooks, vars(copied)[kind], memo, seen)
            if "forward" in vars(copied) and is_bound_as_it_was(copied):
                del vars(copied)["forward"]


def _rebind_in(held: Any, ours: Any, memo: Memo, seen: set[int]) -> None:
    """Exchange the functions in a container that was copied."""
    for key, value in list(held.items() if isinstance(held, dict) else enumerate(held)):
        if id(value) in seen:
            continue
        if isinstance(value, _FUNCTIONS):
            if isinstance(ours, tuple):  # made anew with its functions
                continue
            copied = ours.get(key) if isinstance(ours, dict) else ours[key]
            remade = isinstance(value, types.FunctionType) and copied is not value  # by a __setstate__
            if not remade and _reaches(value, memo, set()):
                ours[key] = _rebound(value, memo)
            continue
        seen.add(id(value))
        if isinstance(value, tuple):
            if _has_reaching_functions(value, memo) and not isinstance(ours, tuple):
                ours[key] = _tuple_rebound(value, memo)
            _rebind_in(value, value, memo, seen)
        elif isinstance(value, set):
            reaching = [item for item in value if _is_reaching_function(item, memo)]
            memo.get(id(value), value).symmetric_difference_update([*reaching, *(_rebound(f, memo) for f in reaching)])
        elif (own := memo.get(id(value), value)) is not value and not isinstance(value, (nn.Module, type)):
            if isinstance(value, (dict, list, deque)):
                _rebind_in(value, own, memo, seen)
            elif hasattr(value, "__dict__") and type(own) is type(value):
                _rebind_in(vars(value), vars(own), memo, seen)


def _is_reaching_function(value: Any, memo: Memo) -> bool:
    return isinstance(value, _FUNCTIONS) and _reaches(value, memo, set())


def _has_reaching_functions(value: tuple[Any, ...], memo: Memo) -> bool:
    return any(
        _has_reaching_functions(v, memo) if isinstance(v, tuple) else _is_reaching_function(v, memo) for v in value
    )


def _tuple_rebound(value: Any, memo: Memo) -> Any:
    if isinstance(value, tuple) and _has_reaching_functions(value, memo):
        items = [_tuple_rebound(item, memo) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return _rebound(value, memo) if _is_reaching_function(value, memo) else copy.deepcopy(value, memo)


def _rebound(value: Any, memo: Memo) -> Any:
    """What this is in the copy."""
    if isinstance(value, functools.partial):
        arguments = [_rebound(argument, memo) for argument in value.args]
        keywords = {key: _rebound(argument, memo) for key, argument in value.keywords.items()}
        return functools.partial(_rebound(value.func, memo), *arguments, **keywords)
    if isinstance(value, types.MethodType):
        return types.MethodType(_rebound(value.__func__, memo), copy.deepcopy(value.__self__, memo))
    if type(value) in _CONTAINERS and id(value) not in memo and _reaches(value, memo, set()):
        return _container_rebound(value, memo)
    if not isinstance(value, types.FunctionType):
        made = copy.deepcopy(value, memo)
        if _is_object(value) and made is not value:
            _rebind_in(vars(value), vars(made), memo, set())
        return made
    if id(value) in memo:
        return memo[id(value)]
    if "_torchdynamo_orig_callable" in vars(value):  # by torch.compile; the copy runs what was compiled
        return _rebound(vars(value)["_torchdynamo_orig_callable"], memo)
    return _remade(value, memo) if _reaches(value, memo, set()) else value


def _container_rebound(value: Any, memo: Memo) -> Any:
    """One that only functions hold: what else is in it stays the caller's."""
    if isinstance(value, tuple):
        return tuple(_rebound_or_same(item, memo) for item in value)
    made = memo[id(value)] = type(value)()  # first: it may hold itself
    if isinstance(value, dict):
        made.update({key: _rebound_or_same(item, memo) for key, item in value.items()})
    else:
        made.extend(_rebound_or_same(item, memo) for item in value)
    return made


def _remade(function: types.FunctionType, memo: Memo) -> types.FunctionType:
    """The same function, with what it has enclosed, and the defaults of its arguments, as they are in the copy."""
    cells, defaults = function.__closure__, function.__defaults__
    own = None if cells is None else tuple(types.CellType() if _reaches(c, memo, set()) else c for c in cells)
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, own)
    vars(made).update(vars(function))
    memo[id(function)] = made  # first: it may enclose itself
    for ours, theirs in zip(own or (), cells or (), strict=True):
        if ours is not theirs:
            ours.cell_contents = _rebound(theirs.cell_contents, memo)
    made.__defaults__ = defaults and tuple(_rebound_or_same(value, memo) for value in defaults)
    keywords = function.__kwdefaults__
    made.__kwdefaults__ = keywords and {key: _rebound_or_same(value, memo) for key, value in keywords.items()}
    return made


def _rebound_or_same(value: Any, memo: Memo) -> Any:
    return _rebound(value, memo) if _reaches(value, memo, set()) else value


def _reaches(value: Any, memo: Memo, seen: set[int]) -> bool:
    """Whether calling this runs a module that was copied, or uses a container that was; the rest stays the caller's."""
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, nn.Module):
        return id(value) in memo
    if memo.get(id(value), value) is not value and (isinstance(value, _HELD) or is_data(value)):
        return True
    return any(_reaches(held, memo, seen) for held in _called_by(value))


def _called_by(value: Any) -> list[Any]:
    """What an object runs or hands on when it is called."""
    if isinstance(value, types.CellType):
        try:
            return [value.cell_contents]
        except ValueError:  # it is empty
            return []
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        return [*(value.__closure__ or ()), *defaults_of(value)]
    if type(value) in _CONTAINERS:
        return [held for held in (value.values() if isinstance(value, dict) else value) if type(held) not in ATOMS]
    return list(vars(value).values()) if _is_object(value) and callable(value) else []


def _is_object(value: Any) -> bool:
    opaque: tuple[type[Any], ...] = (type, types.ModuleType, nn.Module)
    return hasattr(value, "__dict__") and not isinstance(value, opaque)
