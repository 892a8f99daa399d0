"""Has the wrapped model changed since the last update, and how deeply?"""

import enum
import operator
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..modules import hooks_of, inside_of, is_data


class Change(enum.Enum):
    """What has happened to the wrapped model since the last look."""

    NONE = "nothing"
    VALUES = "values of tensors"
    TENSORS = "tensors replaced by ones of the same kind, or moved"
    STRUCTURE = "modules, shapes, devices, hooks or plain attributes"


class _Whatever:
    """Equal to anything: stands in a snapshot for what does not matter."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


_WHATEVER = _Whatever()

# Fused optimizers move no version counter, so steps are counted by one hook for all models.
_watching: weakref.WeakSet["Freshness"] = weakref.WeakSet()
_watching_lock = threading.RLock()  # one thread may step an optimizer while another makes a fast model


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _watching:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    with _watching_lock:
        watching = list(_watching)
    for freshness in watching:
        freshness.note_step(stepped)


register_optimizer_step_post_hook(_after_step)


class Freshness:
    """A snapshot of a module, and the comparison with what it is now.

    Noticed: a tensor replaced in its module's dict, an in-place change (version counters of all parameters and
    buffers), ``tensor.data = ...`` (data pointers), a step of any optimizer that holds one of the parameters, a plain
    attribute set to another value, modules and hooks added or removed. Not noticeable: ``.data.mul_()`` and the like,
    writes through numpy views, replayed CUDA graphs.

    The comparison is one dict comparison per module, in C, so that it can be made before every forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.take()
        with _watching_lock:
            _watching.add(self)

    def take(self, change: Change = Change.STRUCTURE) -> None:
        """Remember the module as it is now; no more than ``change`` was seen to have happened since the last time."""
        if change is Change.STRUCTURE:
            self._take_structure()
        if change in (Change.STRUCTURE, Change.TENSORS):
            self._take_tensors()
        self._stepped = False
        self._versions = [t._version for t in self._versioned]

    def _take_structure(self) -> None:
        self._modules = list(self.module.modules())
        self._looked_at = [attributes for m in self._modules for attributes in _attributes_of(m)]
        self._snapshots = list(map(_snapshot, self._looked_at))
        held = [item for m in self._modules for item in _held_by(m)]
        self._objects = [(o, _freeze(vars(o))) for o in held if not isinstance(o, Tensor)]
        self._nested = [t for t in held if isinstance(t, Tensor)]
        self._nested_pins = [t.detach() for t in self._nested]
        self._nested_state = list(map(_state, self._nested))
        self._dicts = [d for m in self._modules for d in (m._parameters, m._buffers)]
        self._names = [list(d) for d in self._dicts]
        self._places = [(vars(m), k) for m in self._modules for k, v in vars(m).items() if isinstance(v, Tensor)]

    def _take_tensors(self) -> None:
        self._registered = self._now_registered()
        self._attributes = [(attributes, key, attributes[key]) for attributes, key in self._places]
        self._tensors = [t for t in self._registered if t is not None] + [t for _, _, t in self._attributes]
        self._ids = set(map(id, self._tensors))
        self._kinds = list(map(_kind, self._tensors))
        self._pins = [t.detach() for t in self._tensors]  # freed storage could come back at the same address
        self._pointers = [t.data_ptr() for t in self._tensors]
        self._versioned = [t for t in self._tensors if not t.is_inference()]

    def note_step(self, stepped: set[int]) -> None:
        """An optimizer has stepped the tensors with these ids."""
        if not stepped.isdisjoint(self._ids):  # written only so: two threads may be here
            self._stepped = True

    def change(self) -> Change:
        """The deepest change since :meth:`take`."""
        if not all(map(_same, self._looked_at, self._snapshots)):
            return Change.STRUCTURE
        if any(not _same(_freeze(vars(o)), frozen) for o, frozen in self._objects):
            return Change.STRUCTURE
        if list(map(_state, self._nested)) != self._nested_state:  # no refresh follows these: all is built anew
            return Change.STRUCTURE
        now = self._now_registered()
        replaced = len(now) != len(self._registered) or not all(map(operator.is_, now, self._registered))
        if replaced and self._registered_changed(now):
            return Change.STRUCTURE
        others = [(tensor, a[key]) for a, key, tensor in self._attributes if a[key] is not tensor]
        if any(not isinstance(new, Tensor) or _family(new) != _family(old) for old, new in others):
            return Change.STRUCTURE
        moved = [t.data_ptr() for t in self._tensors] != self._pointers
        if list(map(_kind, self._tensors)) != self._kinds:  # by ``tensor.data = ...``
            return Change.STRUCTURE
        if replaced or others or moved:
            return Change.TENSORS
        stale = self._stepped or [t._version for t in self._versioned] != self._versions
        return Change.VALUES if stale else Change.NONE

    def _now_registered(self) -> list[Tensor | None]:
        return [t for d in self._dicts for t in d.values()]

    def _registered_changed(self, now: list[Tensor | None]) -> bool:
        if [list(d) for d in self._dicts] != self._names:
            return True
        pairs = zip(now, self._registered, strict=True)
        return any(_kind(new) != _kind(old) for new, old in pairs if new is not old)


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    try:
        return bool(now == before)
    except Exception:  # a replaced tensor or array has no truth value: it is another one
        return False


def _attributes_of(module: nn.Module) -> list[dict[str, Any]]:
    if inside_of(module) is None:
        return [vars(module)]
    # DataParallel and its kin: what they keep for themselves, and change in every forward pass, does not matter here.
    return [module._modules, *hooks_of(module).values()]


def _snapshot(attributes: dict[str, Any]) -> dict[str, Any]:
    # Modes are no change; tensors are compared one by one, by identity.
    passed_over = ("training", "_parameters", "_buffers")
    return {
        key: _WHATEVER if key in passed_over or isinstance(value, Tensor) else _shallow(value)
        for key, value in attributes.items()
    }


def _shallow(value: Any) -> Any:
    """The value with its containers copied, so that a change inside them shows in a comparison."""
    if isinstance(value, dict):
        return {key: _shallow(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shallow(item) for item in value]
    if isinstance(value, tuple):
        return tuple(map(_shallow, value))
    return set(value) if isinstance(value, set) else value


def _held_by(module: nn.Module) -> Iterator[Any]:
    """What a dict comparison does not look into: tensors in containers, and objects that hold data and nothing else.

    (A configuration is followed. A trainer, a logger or a data set that the module happens to hold is not: it changes
    all the time.)
    """
    known = set(map(id, (*module.children(), *module.parameters(False), *module.buffers(False))))
    if inside_of(module) is not None:
        return
    stack = [value for value in vars(module).values() if not isinstance(value, Tensor)]
    while stack:
        value = stack.pop()
        if id(value) in known or isinstance(value, nn.Module):
            continue
        known.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, set, dict)):
            stack += value.values() if isinstance(value, dict) else value
        elif is_data(value):
            yield value
            stack += vars(value).values()


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _freeze(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: _shallow(value) for key, value in attributes.items()}


def _family(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, type(tensor)


def _kind(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, type(tensor))
