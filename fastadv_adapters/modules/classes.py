"""What a module is: its class, its hooks, and the module inside if it is a wrapper.

A module is looked at through ``vars()``: a user's ``__getattr__`` may ask the module inside for what it lacks.
"""

from collections.abc import Iterator
from functools import cached_property, partialmethod
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .leaving_out import TRAINING, is_trainer
from .process_wide import is_process_wide

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
ALL_HOOKS = tuple(key for key in vars(nn.Module()) if "_hooks" in key)
ATOMS = frozenset((str, int, float, bool, bytes, type(None), torch.Size, torch.dtype, torch.device))
"""Types of constants: they hold nothing else, and never change."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class _Unannounced:
    """First base of the classes made here: the user's ``__init_subclass__``, which may keep a register, is not run."""

    def __init_subclass__(cls) -> None:
        pass


def become(part: nn.Module, mixin: type) -> None:
    """Change a module's class in place: whoever refers to it still finds it, and isinstance still holds."""
    name, kind = f"{mixin.__name__.strip('_')}{type(part).__name__}", type(part)
    first = () if issubclass(kind, _Unannounced) else (_Unannounced,)
    try:
        object.__setattr__(part, "__class__", type(name, (*first, mixin, kind), {}))  # past a __setattr__ of its own
    except TypeError:  # the first base of its class is one without attributes, ABC or Generic: so has to be this one's
        object.__setattr__(part, "__class__", _derived(name, kind, (*first, mixin)))


def _derived(name: str, kind: type, before: tuple[type, ...]) -> type:
    """A class derived from ``kind``, as its objects lie in memory, whose methods are looked up ``before`` in others."""
    known = set(kind.__mro__)
    found = [one for base in before for one in base.__mro__ if one not in known]
    meta = type(f"Meta{name}", (type(kind),), {"mro": lambda made: [made, *dict.fromkeys(found), *kind.__mro__]})
    made: type = meta(name, (kind, *before), {})
    return made


def kind_of(part: nn.Module) -> type[nn.Module]:
    """The class that a module had before :func:`become`."""
    package = __name__.partition(".")[0]
    return next(kind for kind in type(part).__mro__ if kind.__module__.partition(".")[0] != package)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling this module runs more than the forward of its class: hooks, or another forward."""
    if any(vars(module)[kind] for kind in HOOKS):
        return True
    return "forward" in vars(module) and not is_bound_as_it_was(module) and inside_of(module) is None


def is_bound_as_it_was(module: nn.Module) -> bool:
    """Whether the forward on the instance is that of its class, as libraries leave it behind that patched it once."""
    forward = vars(module)["forward"]
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)  # what torch.compile was given
    if not isinstance(forward, MethodType):
        return False
    return forward.__self__ is module and forward.__func__ is type(module).forward


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """What a module has in addition to what every module has."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def put_on(tensor: Tensor) -> dict[str, Any]:
    """What code has put on a tensor, such as a mask; without the notes of a compiler, and gradients (grad_sample)."""
    return {
        name: value for name, value in vars(tensor).items() if not name.startswith("_dynamo") and "grad" not in name
    }


def things_of(module: nn.Module) -> dict[str, Any]:
    """The same without constants, in which there is nothing to look for."""
    return {name: value for name, value in attributes_of(module).items() if type(value) not in ATOMS}


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """What a module keeps of its hooks."""
    return {key: vars(module)[key] for key in ALL_HOOKS}


def inside_of(module: nn.Module) -> nn.Module | None:
    """The module inside, if this one only runs it elsewhere or otherwise (DataParallel, torch.compile); else None."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module._modules["module"]
    return module._modules["_orig_mod"] if _is_compiled(type(module)) else None


def _is_compiled(kind: type) -> bool:
    """Whether this is the class of what ``torch.compile`` returns, which is slow to import."""
    return any(k.__name__ == "OptimizedModule" and k.__module__.startswith("torch.") for k in kind.__mro__)


def is_data(value: object) -> bool:
    """Whether an object holds data and does nothing, as a configuration."""
    if not hasattr(value, "__dict__") or callable(value) or isinstance(value, (ModuleType, *TRAINING)):
        return False
    if is_trainer(value) or is_process_wide(value):
        return False
    return not any(callable(item) for item in vars(value).values())


def are_equal(now: Any, before: Any) -> bool:
    """Whether two values are equal; not if they cannot say so, as tensors and arrays, which have no truth value."""
    try:
        return bool(now == before)
    except Exception:
        return False


def names_in(code: CodeType) -> Iterator[str]:
    """The names that code uses, and those of the functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def defaults_of(function: FunctionType) -> tuple[Any, ...]:
    """The defaults of its arguments, which it has in every call that does not give them."""
    return *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()


def functions_in(attribute: Any) -> list[FunctionType]:
    """The functions that an attribute of a class runs: those of decorators, and at last the one that was decorated."""
    found, seen = list[FunctionType](), list[Any]()
    while attribute is not None and all(attribute is not one for one in seen):
        seen.append(attribute)
        if isinstance(attribute, FunctionType):
            found.append(attribute)
        attribute = _inside(attribute)
    return found


def _inside(attribute: Any) -> Any:
    """What a property, another descriptor or a decorator's function was made of; None if it was of nothing."""
    if isinstance(attribute, property):
        return attribute.fget
    if isinstance(attribute, (cached_property, partialmethod)):
        return attribute.func
    if isinstance(attribute, (staticmethod, classmethod, MethodType)):
        return attribute.__func__
    held = getattr(attribute, "__dict__", None)  # a __getattr__ may make up one
    return held.get("__wrapped__") if isinstance(held, (dict, MappingProxyType)) else None
