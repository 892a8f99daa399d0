"""A copy of a module with its tensors as told: aliases of the original's, or clones of them."""

import copy
import dis
import gc
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .classes import ALL_HOOKS, HOOKS, hooks_of, inside_of

_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.FrameType)


def alias(tensor: Tensor) -> Tensor:
    """The same storage without history and without a gradient; a parameter stays a parameter."""
    detached = tensor.detach()
    return nn.Parameter(detached, requires_grad=False) if isinstance(tensor, nn.Parameter) else detached


def clone(tensor: Tensor) -> Tensor:
    """Own storage, no history, no gradient; a parameter stays a parameter."""
    cloned = tensor.detach().clone()
    return nn.Parameter(cloned, requires_grad=False) if isinstance(tensor, nn.Parameter) else cloned


def copy_module(module: nn.Module, tensor_for: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy in eval mode that shares nothing with ``module`` but what ``tensor_for`` shares.

    Every tensor that can be reached is replaced by ``tensor_for(tensor)``, stored activations and the recomputed
    weights of weight norm too, on which a plain ``copy.deepcopy`` raises. Mode flags are set one by one: ``eval()``
    of a user's class may write into weights (merged adapters do).

    Raises:
        ValueError: the module cannot be copied without reaching back into the original.
    """
    refuse_what_reaches_back(module)
    memo: dict[int, Any] = {id(t): tensor_for(t) for t in tensors_in(module)}
    try:
        with torch.no_grad():
            _copy_wrappers(module, memo)
            copied: nn.Module = copy.deepcopy(module, memo)
    except Exception as error:
        raise ValueError(
            f"expected a model that can be copied, but copying {type(module).__name__} raised "
            f"{type(error).__name__}: {error}. Remove what cannot be copied (locks, open files, handles) from the "
            f"model's attributes, or give the class a __deepcopy__ that honours its memo"
        ) from error
    for part in copied.modules():
        part.training = False
        if type(part) in _RECURRENT:
            # cuDNN has no backward pass in eval mode; without dropout both modes are the same function.
            vars(part).update(dropout=0.0, training=True)
    return copied


def in_one_block(network: nn.Module) -> nn.Module:
    """The same copy, whose recurrent layers have collected their weights anew, on CUDA into one block of memory."""
    for part in network.modules():
        if isinstance(part, nn.RNNBase):
            part._apply(lambda tensor: tensor)
    return network


class _Wrapped(nn.Module):
    """In the place of a wrapper: calls the module inside, here and as it is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (inside,) = self.children()
        return inside(*args, **kwargs)


def _copy_wrappers(module: nn.Module, memo: dict[int, Any]) -> None:
    """Put into the memo what stands for the wrappers in ``module``, which can only be copied with what they run on."""
    wrappers = [part for part in module.modules() if inside_of(part) is not None]
    memo.update({id(wrapper): _Wrapped() for wrapper in wrappers})
    for wrapper in wrappers:
        own = {"_modules": wrapper._modules, **hooks_of(wrapper)}
        vars(memo[id(wrapper)]).update(copy.deepcopy(own, memo))


def tensors_in(root: object) -> Iterator[Tensor]:
    """Every tensor that a deep copy of ``root`` would meet."""
    seen, stack = {id(root)}, [root]
    while stack:
        for item in gc.get_referents(stack.pop()):
            if id(item) in seen or isinstance(item, _OPAQUE):
                continue
            seen.add(id(item))
            if isinstance(item, Tensor):
                yield item
            elif gc.is_tracked(item):
                stack.append(item)


def refuse_what_reaches_back(module: nn.Module) -> None:
    """Raise ValueError where a copy's code would still run on, or write into, the original."""
    own = {id(m) for m in module.modules()}
    for name, part in module.named_modules():
        where = f"{type(part).__name__}" + (f" ({name})" if name else "")
        if inside_of(part) is None:
            _refuse_functions(part, where, own)
        for hook in (h for kind in HOOKS for h in getattr(part, kind).values()):
            if any(id(value) in own for value in _captured(hook)):
                raise ValueError(
                    f"expected hooks that reach their module through their arguments, got {_name(hook)} on {where}, "
                    f"which captures a part of the model itself and would write into it from the copy. Remove the "
                    f"hook before wrapping, or use the module that the hook is handed"
                )


def _refuse_functions(part: nn.Module, where: str, own: set[int]) -> None:
    if "forward" in vars(part):
        raise ValueError(
            f"expected forward to be a method of the class, got one patched on the instance of {where}, whose "
            f"copy would still run the original. Define a subclass with that forward and wrap it"
        )
    for name, value in vars(part).items():
        if name in ALL_HOOKS or name == "_compiled_call_impl":  # the latter is not copied
            continue
        held = tuple(value.values()) if isinstance(value, dict) else value
        functions = held if isinstance(held, (list, tuple, set)) else (held,)
        if any(id(captured) in own for function in functions for captured in _captured(function)):
            raise ValueError(
                f"expected functions in attributes that are free of the model itself, got {name} of {where}, which "
                f"captures a part of it and would run on the original from the copy. Make it a method of the class "
                f"(and compile the whole model instead of one method)"
            )


def _captured(function: object) -> Iterator[object]:
    """What a function reaches besides its arguments: closures, and the globals that its own code reads."""
    seen, stack = set[int](), [function]
    while stack:
        inner = stack.pop()
        if id(inner) in seen or not isinstance(inner, types.FunctionType):
            continue  # a bound method or an object: deepcopy takes it along with the copy
        seen.add(id(inner))
        values = [cell.cell_contents for cell in inner.__closure__ or () if _filled(cell)]
        yield from (value.__self__ if isinstance(value, types.MethodType) else value for value in values)
        yield from (inner.__globals__.get(name) for name in _globals_read(inner.__code__))
        stack += values


def _globals_read(code: types.CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_read(constant)


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _name(hook: object) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))
