"""Has the wrapped model changed since the last update, and how deeply?"""

import enum
import operator
import threading
import weakref
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..modules import (
    are_equal,
    held_by,
    held_in,
    hooks_of,
    inside_of,
    is_left_out,
    kind,
    modules_of,
    own_tensors,
    pointer,
    put_on,
)
from .corners import Corners
from .snapshots import freeze, seen_on, snapshot


class Change(enum.Enum):
    """What has happened to the wrapped model since the last look."""

    NONE = "nothing"
    VALUES = "values of tensors"
    TENSORS = "tensors replaced by ones of the same kind, or moved"
    STRUCTURE = "modules, shapes, devices, hooks or plain attributes"


# All of these run in C, as ``map`` does: a model has hundreds of tensors, and is looked at before every pass.
_forward, _version, _shape, _dtype = map(operator.attrgetter, ("forward", "_version", "shape", "dtype"))


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
    attribute set to another value, modules and hooks added or removed; on a processor also what leaves no record, such
    as ``.data.mul_()``, if it changes the first or the last value of a tensor.

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
        self._values = self._corners.now()
        self._versions = list(map(_version, self._versioned))
        self._written = list(map(_version, self._parameters))
        self._switches = self._now_switches()

    def _take_structure(self) -> None:
        self._modules = list(modules_of(self.module))
        self._classes: list[Any] = list(map(type, self._modules))
        self._kinds_of_parts = list(set(self._classes))
        self._unsteady = [kind for kind in self._kinds_of_parts if _forward(kind) is not _forward(kind)]
        self._kinds_of_parts = [kind for kind in self._kinds_of_parts if kind not in self._unsteady]
        self._forwards = list(map(_forward, self._kinds_of_parts))
        self._descriptors = list(map(_descriptor, self._unsteady))
        self._looked_at = [attributes for m in self._modules for attributes in _attributes_of(m)]
        self._snapshots = list(map(snapshot, self._looked_at))
        registered = set(map(id, self._modules))
        held = [item for m in self._modules for item in held_by(m, registered)]
        self._objects = [(o, freeze(vars(o))) for o in held if not isinstance(o, Tensor)]
        own = set(map(id, own_tensors(self.module)))
        self._holds_own = any(id(item) in own for item in held)
        self._held = [t for t in held if isinstance(t, Tensor) and id(t) not in own]
        self._held_pins = [t.detach() for t in self._held]
        self._held_kinds = list(map(_place, self._held))
        dicts: list[dict[str, Any]] = [d for m in self._modules for d in (m._parameters, m._buffers)]
        self._dicts = [d for d in dicts if d]
        values = chain.from_iterable(map(dict.values, self._looked_at))
        self._empty = [d for d in (*dicts, *values) if isinstance(d, dict) and not d]  # hooks, most of them
        self._names = [list(d) for d in self._dicts]
        self._places = [(vars(m), k) for m in self._modules for k, v in vars(m).items() if isinstance(v, Tensor)]

    def _take_tensors(self) -> None:
        self._registered = self._now_registered()
        owned = [t for t in self._registered if t is not None]
        self._bare = [t for t in owned if not put_on(t)]
        self._attributes_of_bare = list(map(vars, self._bare))
        self._given = [(t, seen_on(t)) for t in owned if put_on(t)]
        self._gives_tensors = any(isinstance(v, Tensor) for t, _ in self._given for v in held_in(put_on(t).values()))
        self._attributes = [(attributes, key, attributes[key]) for attributes, key in self._places]
        self._tensors = [t for t in self._registered if t is not None] + [t for _, _, t in self._attributes]
        self._ids = set(map(id, (*self._tensors, *self._held)))
        self._pins = [t.detach() for t in self._tensors]  # freed storage could come back at the same address
        self._strided = [t for t in self._tensors if t.layout is torch.strided]
        self._sparse = [t for t in self._tensors if t.layout is not torch.strided]
        self._kinds, self._devices, self._pointers = self._now_kinds(), self._now_devices(), self._now_pointers()
        self._corners = Corners(zip(self._strided, self._pointers, strict=False))  # those of sparse ones come last
        self._parameters = [t for t in owned if isinstance(t, nn.Parameter) and not t.is_inference()]
        self._versioned = [t for t in (*self._tensors, *self._held) if not t.is_inference()]

    def note_step(self, stepped: set[int]) -> None:
        """An optimizer has stepped the tensors with these ids."""
        if not stepped.isdisjoint(self._ids):  # written only so: two threads may be here
            self._stepped = True

    def change(self, *, asked: bool = False) -> Change:
        """The deepest change since :meth:`take`; if an update is ``asked`` for, what may have changed unseen, too."""
        if asked and self._gives_tensors:  # no refresh follows these
            return Change.STRUCTURE
        if list(map(type, self._modules)) != self._classes:
            return Change.STRUCTURE
        if list(map(_forward, self._kinds_of_parts)) != self._forwards:
            return Change.STRUCTURE
        if self._unsteady and list(map(_descriptor, self._unsteady)) != self._descriptors:
            return Change.STRUCTURE
        if any(self._empty) or not are_equal(self._looked_at, self._snapshots):
            return Change.STRUCTURE
        if self._objects and not are_equal([freeze(vars(o)) for o, _ in self._objects], [f for _, f in self._objects]):
            return Change.STRUCTURE
        if any(self._attributes_of_bare) and any(map(put_on, self._bare)):
            return Change.STRUCTURE
        if self._given and not are_equal([seen_on(t) for t, _ in self._given], [seen for _, seen in self._given]):
            return Change.STRUCTURE
        if list(map(_place, self._held)) != self._held_kinds:  # by ``tensor.data = ...``; no refresh follows that
            return Change.STRUCTURE
        now = self._now_registered()
        replaced = len(now) != len(self._registered) or not all(map(operator.is_, now, self._registered))
        if replaced and self._registered_changed(now):
            return Change.STRUCTURE
        others = [(tensor, a[key]) for a, key, tensor in self._attributes if a[key] is not tensor]
        if any(not isinstance(new, Tensor) or _family(new) != _family(old) for old, new in others):
            return Change.STRUCTURE
        moved = self._now_pointers() != self._pointers
        if self._now_kinds() != self._kinds or (moved and self._now_devices() != self._devices):  # by ``tensor.data =``
            return Change.STRUCTURE
        if replaced or others or moved:
            given = self._given or any(map(_is_given, now))
            return Change.STRUCTURE if self._holds_own or given else Change.TENSORS
        if self._now_switches() != self._switches:  # a trace may have taken the other branch
            return Change.STRUCTURE
        self._stepped = self._stepped or self._corners.now() != self._values  # where nothing has moved
        stale = self._stepped or list(map(_version, self._versioned)) != self._versions
        return Change.VALUES if stale else Change.NONE

    def wrote_parameters(self) -> bool:
        """Whether somebody has written into parameters since :meth:`take`; buffers have copies everywhere."""
        return self._stepped or list(map(_version, self._parameters)) != self._written

    def _now_registered(self) -> list[Tensor | None]:
        return list(chain.from_iterable(map(dict.values, self._dicts)))

    def _now_switches(self) -> list[int]:
        found = chain((t for _, _, t in self._attributes), self._held)
        switches = [t for t in found if t.dtype == torch.bool and t.numel() == 1]
        return [int(t) if t.device.type == "cpu" else t._version for t in switches if not t.is_inference()]

    def _now_kinds(self) -> list[Any]:
        # Much of the whole comparison; so no call of kind() for each strided tensor, and no device, which is slow.
        strided = self._strided
        found: list[Any] = [*map(_shape, strided), *map(Tensor.stride, strided), *map(_dtype, strided)]
        return [*found, *map(type, strided), *map(kind, self._sparse)]

    def _now_devices(self) -> list[torch.device]:
        return [t.device for t in self._tensors]

    def _now_pointers(self) -> list[Any]:
        return list(map(Tensor.data_ptr, self._strided)) + list(map(pointer, self._sparse))

    def _registered_changed(self, now: list[Tensor | None]) -> bool:
        if [list(d) for d in self._dicts] != self._names:
            return True
        pairs = zip(now, self._registered, strict=True)
        return any(_kind(new) != _kind(old) for new, old in pairs if new is not old)


def _descriptor(kind: type) -> Any:
    """What a class has for its forward, such as a ``partialmethod``, which gives another function each time."""
    return next((vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base)), None)


def _kind(tensor: Tensor | None) -> tuple[object, ...] | None:
    return None if tensor is None else kind(tensor)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return pointer(tensor), kind(tensor)


def _attributes_of(module: nn.Module) -> list[dict[str, Any]]:
    if is_left_out(module):
        return []
    if inside_of(module) is None:
        return [vars(module)]
    # DataParallel and its kin: what they keep for themselves, and change in every forward pass, does not matter here.
    return [module._modules, *hooks_of(module).values()]


def _is_given(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(put_on(tensor))


def _family(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, type(tensor)
