"""A copy of a module with its tensors as told: aliases of the original's, or clones of them."""

import copy
import gc
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.FrameType)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


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
    memo: dict[int, Any] = {id(t): tensor_for(t) for t in _tensors_in(module)}
    try:
        with torch.no_grad():
            copied = copy.deepcopy(module, memo)
    except Exception as error:
        raise ValueError(
            f"expected a model that can be copied, but copying {type(module).__name__} raised "
            f"{type(error).__name__}: {error}. Remove what cannot be copied (locks, open files, handles) from the "
            f"model's attributes, or give the class a __deepcopy__ that honours its memo"
        ) from error
    for part in copied.modules():
        part.training = False
    return copied


def has_hooks(module: nn.Module) -> bool:
    """Whether calling this module runs more than its forward."""
    return any(getattr(module, kind) for kind in _HOOKS)


def _tensors_in(root: object) -> Iterator[Tensor]:
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
        if "forward" in vars(part):
            raise ValueError(
                f"expected forward to be a method of the class, got one patched on the instance of {where}, whose "
                f"copy would still run the original. Define a subclass with that forward and wrap it"
            )
        for hook in (h for kind in _HOOKS for h in getattr(part, kind).values()):
            if any(id(value) in own for value in _captured(hook)):
                raise ValueError(
                    f"expected hooks that reach their module through their arguments, got {_name(hook)} on {where}, "
                    f"which captures a part of the model itself and would write into it from the copy. Remove the "
                    f"hook before wrapping, or use the module that the hook is handed"
                )


def _captured(hook: Callable[..., Any]) -> Iterator[object]:
    """What a hook reaches besides its arguments: its closure, and the globals that its code names."""
    if not isinstance(hook, types.FunctionType):
        return  # a bound method or an object: deepcopy takes it along with the copy
    yield from (cell.cell_contents for cell in hook.__closure__ or () if _filled(cell))
    yield from (hook.__globals__.get(name) for name in hook.__code__.co_names)


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _name(hook: object) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))
