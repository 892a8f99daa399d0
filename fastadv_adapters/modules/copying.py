"""A copy of a module with its tensors as told: aliases of the original's, or clones of them."""

import copy
import functools
import gc
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .classes import ALL_HOOKS, ATOMS, hooks_of, inside_of, put_on
from .leaving_out import in_place_of, is_left_out, is_trainer
from .reaching_back import refuse_what_reaches_back
from .rebinding import rebind
from .refusals import refusals_borne
from .switching import has_own_switch, switch
from .walking import children_of, modules_of
from .weak import is_weak, redirect

_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.FrameType)
_CONTAINERS = frozenset((dict, list, tuple, set, OrderedDict))
_LOCKS = {type(make()): make for make in (threading.Lock, threading.RLock)}


def alias(tensor: Tensor) -> Tensor:
    """The same storage without history and without a gradient; a parameter stays a parameter."""
    detached = tensor.detach()
    return nn.Parameter(detached, requires_grad=False) if isinstance(tensor, nn.Parameter) else detached


def clone(tensor: Tensor) -> Tensor:
    """Own storage, no history, no gradient; a parameter stays a parameter."""
    cloned = tensor.detach().clone()
    return nn.Parameter(cloned, requires_grad=False) if isinstance(tensor, nn.Parameter) else cloned


def thaw(copied: nn.Module, source: nn.Module) -> None:
    """Let parameters, and tensors in attributes, want a gradient where those of the source do: its code may ask."""
    for theirs, ours in zip(modules_of(source), modules_of(copied), strict=True):
        for held in ("_parameters", "__dict__"):
            for name, tensor in getattr(theirs, held).items():
                own = getattr(ours, held).get(name)
                if isinstance(tensor, Tensor) and isinstance(own, Tensor) and not own.is_inference():
                    own.requires_grad_(tensor.requires_grad)


def copy_module(module: nn.Module, tensor_for: Callable[[Tensor], Tensor], *, switches: bool = True) -> nn.Module:
    """A copy in eval mode that shares nothing with ``module`` but what ``tensor_for`` shares, and owners of hooks.

    Every tensor that can be reached is replaced by ``tensor_for(tensor)``, stored activations and the recomputed
    weights of weight norm too, on which a plain ``copy.deepcopy`` raises. Mode flags are set one by one, for ``eval()``
    of a user's class may write into weights (merged adapters do); it is called if it does not. (If nothing ``switches``
    it is not: what is copied is a copy in eval mode.)

    Raises:
        ValueError: the module cannot be copied without reaching back into the original.
    """
    copied = copied_as_it_is(module, tensor_for)
    if switches and switches_attributes(module):
        _switching.add(copied)
    to_eval_mode(copied)
    return copied


_switching: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Copies that go to eval mode in the model's own way."""


def to_eval_mode(copied: nn.Module) -> None:
    """Put a copy into eval mode, again after an update: what the model's own ``eval()`` computes is of its weights."""
    if copied in _switching:
        with torch.no_grad():
            copied.eval()
    for part in modules_of(copied):
        part.training = False
        if type(part) in _RECURRENT:
            # cuDNN has no backward pass in eval mode; without dropout both modes are the same function.
            vars(part).update(dropout=0.0, training=True)


def switches_attributes(module: nn.Module) -> bool:
    """Whether a module goes to eval mode in its own way, and no weight changes by that; tried on a copy."""
    return has_own_switch(module) and bool(switch(copied_as_it_is(module, clone), module))


def copied_as_it_is(module: nn.Module, tensor_for: Callable[[Tensor], Tensor]) -> nn.Module:
    """As :func:`copy_module`, in the modes that the original has."""
    refuse_what_reaches_back(module)
    parts = list(modules_of(module))
    memo: dict[int, Any] = {id(hook): hook for hook in _hooks_of_others(module, parts)}
    layers = _copy_layers(parts, memo, tensor_for)
    for item in _reached(module, memo):
        if type(item) in _CONTAINERS:
            if type(item) is OrderedDict and not item:  # hooks; a deep copy of one takes long
                memo[id(item)] = OrderedDict()
        elif isinstance(item, Tensor):
            memo[id(item)] = tensor_for(item)
        elif is_weak(item) or is_trainer(item) or _is_shared(item):
            memo[id(item)] = item
        elif is_left_out(item):
            memo[id(item)] = in_place_of(item)
        elif isinstance(item, torch.Generator):
            memo[id(item)] = torch.Generator(item.device).set_state(item.get_state())
        elif type(item) in _LOCKS:
            memo[id(item)] = _LOCKS[type(item)]()
    try:
        with torch.no_grad():
            _copy_wrappers(parts, memo)
            _copy_by_state(parts, memo)
            copied: nn.Module = copy.deepcopy(module, memo)
            _refuse_other_layers(copied, layers)
            pairs = [(part, memo[id(part)]) for part in parts]
            rebind(pairs, memo)
            _carry(parts, memo, tensor_for)  # last, for it may be a part of the model
    except Exception as error:
        raise ValueError(
            f"expected a model that can be copied, but copying {type(module).__name__} raised "
            f"{type(error).__name__}: {error}. Remove what cannot be copied (open files, iterators, handles) from the "
            f"model's attributes, or give the class a __deepcopy__ that honours its memo"
        ) from error
    redirect(pairs)
    return copied


class _Wrapped(nn.Module):
    """In the place of a wrapper: calls the module inside, here and as it is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (inside,) = children_of(self)
        return inside(*args, **kwargs)


def _copy_layers(
    parts: list[nn.Module], memo: dict[int, Any], tensor_for: Callable[[Tensor], Tensor]
) -> list[nn.Module]:
    """Put into the memo copies of PyTorch's own layers that hold nothing but tensors and constants; returns the copies.

    Most parts of a model are such, and a deep copy takes several times as long.
    """
    layers = []
    for part in parts:
        if type(part).__module__.startswith("torch.nn.modules.") and all(map(_is_plain, vars(part).values())):
            memo[id(part)] = made = type(part).__new__(type(part))
            vars(made).update({name: _copied(value, memo, tensor_for) for name, value in vars(part).items()})
            layers.append(made)
    return layers


def _refuse_other_layers(copied: nn.Module, layers: list[nn.Module]) -> None:
    """A class whose copies lack layers, or have new ones or the original's, is not to be written into."""
    own = set(map(id, modules_of(copied)))
    if any(id(layer) not in own for layer in layers):
        raise RuntimeError("expected a class whose copies have the layers of the memo, got one with others")


def _copied(value: Any, memo: dict[int, Any], tensor_for: Callable[[Tensor], Tensor]) -> Any:
    if type(value) in ATOMS or type(value) is tuple:
        return value
    if id(value) not in memo:
        if isinstance(value, Tensor):
            memo[id(value)] = tensor_for(value)
        elif isinstance(value, dict):
            memo[id(value)] = type(value)((key, _copied(held, memo, tensor_for)) for key, held in value.items())
        else:
            memo[id(value)] = type(value)(value)
    return memo[id(value)]


def _carry(parts: list[nn.Module], memo: dict[int, Any], tensor_for: Callable[[Tensor], Tensor]) -> None:
    """Give copied parameters and buffers the attributes that code has given to the original ones: a mask, a scale."""
    for tensor in (t for part in parts for held in (part._parameters, part._buffers) for t in held.values()):
        if tensor is None or memo.get(id(tensor), tensor) is tensor:  # not copied: the same, with all that is on it
            continue
        for name, value in put_on(tensor).items():
            if isinstance(value, _OPAQUE):  # a copy of a function is the function
                vars(memo[id(tensor)])[name] = value
                continue
            for item in (value, *_reached(value, memo)):
                if isinstance(item, Tensor) and id(item) not in memo:
                    memo[id(item)] = tensor_for(item)
            with refusals_borne():  # what cannot be copied is left out, and missed if code asks for it
                vars(memo[id(tensor)])[name] = copy.deepcopy(value, memo)


def _is_plain(value: Any) -> bool:
    """Whether this is a constant, a container of constants, or a dict of tensors."""
    kind = type(value)
    if kind not in _CONTAINERS:
        return kind in ATOMS
    if getattr(value, "__dict__", None):  # a state dict's has metadata
        return False
    if kind in (dict, OrderedDict) and not all(held is None or isinstance(held, Tensor) for held in value.values()):
        return False
    return all(type(held) in ATOMS for held in value)


def _copy_wrappers(parts: list[nn.Module], memo: dict[int, Any]) -> None:
    """Put into the memo what stands for the wrappers, which can only be copied with what they run on."""
    wrappers = [part for part in parts if inside_of(part) is not None]
    memo.update({id(wrapper): _Wrapped() for wrapper in wrappers})
    for wrapper in wrappers:
        own = {"_modules": wrapper._modules, **hooks_of(wrapper)}
        vars(memo[id(wrapper)]).update(copy.deepcopy(own, memo))


def _copy_by_state(parts: list[nn.Module], memo: dict[int, Any]) -> None:
    """Put into the memo copies of those modules on which ``copy.deepcopy`` goes wrong.

    It asks the instance for ``__deepcopy__``, and a forwarding ``__getattr__`` hands out that of the module inside. And
    what is in ``__slots__`` is nothing that ``nn.Module`` can be restored from.
    """
    for part in reversed(parts):  # a module comes before those inside
        kind = type(part)
        slots = {name for k in kind.__mro__ for name in _slots(k)} - {"__dict__", "__weakref__"}
        forwards = hasattr(part, "__deepcopy__") and not hasattr(kind, "__deepcopy__")
        if id(part) in memo or not (slots or forwards):
            continue
        memo[id(part)] = made = kind.__new__(kind)
        vars(made).update(copy.deepcopy(vars(part), memo))
        for name in slots:
            if hasattr(part, name):
                object.__setattr__(made, name, copy.deepcopy(getattr(part, name), memo))


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _hooks_of_others(module: nn.Module, parts: list[nn.Module]) -> Iterator[object]:
    """Hooks, and what partials among them hold, that do not belong to the model: their owners look for what they store.

    Functions are not copied anyway. What the model holds in an attribute, too, belongs to it.
    """
    pieces = [p for part in parts for kind in ALL_HOOKS for hook in vars(part)[kind].values() for p in _pieces(hook)]
    owners = [(p, p.__self__ if isinstance(p, types.MethodType) else p) for p in pieces]
    if owners:
        dicts = {id(vars(part)[kind]): None for part in parts for kind in ALL_HOOKS}
        own = {id(module), *map(id, _reached(module, dicts))}
        yield from (piece for piece, owner in owners if id(owner) not in own)


def _pieces(hook: Any) -> Iterator[object]:
    if isinstance(hook, functools.partial):
        for held in (hook.func, *hook.args, *hook.keywords.values()):
            yield from _pieces(held)
    elif not isinstance(hook, _OPAQUE):
        yield hook


def tensors_in(root: object) -> Iterator[Tensor]:
    """Every tensor that a deep copy of ``root`` would meet."""
    return (item for item in _reached(root, {}) if isinstance(item, Tensor))


def leaves_out(root: object) -> bool:
    """Whether a copy of ``root`` would be made without something that it reaches: an optimizer, a fast model."""
    return any(map(is_left_out, _reached(root, {})))


def _reached(root: object, passed_over: dict[int, Any]) -> Iterator[Any]:
    """Every object that a deep copy of ``root`` meets, without those in ``passed_over`` and what is behind them."""
    seen, stack = {id(root)}, [root]
    while stack:
        for item in gc.get_referents(stack.pop()):
            if type(item) in ATOMS or id(item) in seen or id(item) in passed_over or isinstance(item, _OPAQUE):
                if isinstance(item, types.ModuleType) and id(item) not in seen:
                    seen.add(id(item))
                    yield item
                continue
            seen.add(id(item))
            yield item
            if gc.is_tracked(item) and (type(item) in _CONTAINERS or not _is_end(item)):
                stack.append(item)


def _is_shared(item: object) -> bool:
    """Whether this is what the copy and the original can but share: a marker, code, a view of constants."""
    if type(item) is object or isinstance(item, (types.ModuleType, torch.jit.ScriptFunction)):
        return True
    views = (types.MappingProxyType, memoryview)
    return isinstance(item, views) and not any(isinstance(i, (Tensor, nn.Module)) for i in _reached(item, {}))


def _is_end(item: object) -> bool:
    """Whether a copy does not look behind this object."""
    return isinstance(item, Tensor) or is_weak(item) or is_trainer(item) or is_left_out(item)
