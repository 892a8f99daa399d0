"""What modules compute from their weights alone, computed once per update instead of in every pass.

Weight standardisation, weight and spectral norm, and tables of relative positions are of this kind. The module's own
code runs as ever. A ``TorchFunctionMode`` looks at each operator that it calls: if all tensors that go in stand still
between updates, the result is kept, stands still too, and is what the next such call gets. So the code may branch,
count or print as it likes, and whatever it computes from an input it computes anew.

An update computes all that is kept again, in the order in which it was first, into the same tensors: whoever has
recorded their addresses (a CUDA graph) reads the new values.
"""

import types
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..boundary import mark_rewritten
from ..modules import Precision, autocast, generator_states, refusals_borne, states_of_torch
from .keys import NoKeyError, key_for, tensors_of
from .traceless import opened_by

_VARIANTS = 8
"""So many results of one operator on the same tensors are kept: a number may be another one in each pass."""

_PRODUCTS = (F.conv1d, F.conv2d, F.conv3d, F.linear)
_IN_C = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType)
"""PyTorch's own operators, which draw from its generators alone; those written in Python are of other types."""


@dataclass
class _Kept:
    """One result.

    Attributes:
        function, args, kwargs: what was called.
        reads: the tensors that went in.
        result, writes: what came out, and the tensors in it.
        lowered: the dtype of autocast at that call; None if it was off. versions: of all tensors, as last computed.
        asked: whether a later call has got it.
        is_view: whether it is a part of what was read, and needs no computing.
        is_chosen: whether it is such a part, and the value of another tensor may have said which.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: list[Tensor]
    result: Any
    writes: list[Tensor]
    lowered: torch.dtype | None
    versions: list[int] = field(default_factory=list)
    asked: bool = False

    def __post_init__(self) -> None:
        memory, own = ({_memory(t) for t in tensors} for tensors in (self.reads, self.writes))
        self.is_view = own <= memory
        # By an integer tensor: others, as in ``view_as``, tell no more than their shape.
        others = [t for t in self.reads if _memory(t) not in own]
        self.is_chosen = len(others) < len(self.reads) and not all(t.is_floating_point() for t in others)
        self.note()

    @property
    def variant(self) -> tuple[Any, ...]:
        """The operator and the tensors, without constants."""
        return self.function, *map(id, self.reads)

    def note(self) -> None:
        """Take down the versions."""
        self.versions = [t._version for t in (*self.reads, *self.writes)]

    def holds(self) -> bool:
        """Whether nobody has written into what went in or came out, or has begun a graph there."""
        return not any(t.requires_grad for t in self.writes) and self.versions == [
            t._version for t in (*self.reads, *self.writes)
        ]

    def compute(self) -> bool:
        """Compute it again, in place; whether it has the shapes that it had, for others might be broadcast."""
        if not self.is_view:
            with autocast(self.reads[0].device.type, self.lowered):
                new = list(tensors_of(self.function(*self.args, **self.kwargs)))
            if [t.shape for t in new] != [t.shape for t in self.writes]:
                return False
            for own, t in zip(self.writes, new, strict=True):
                own.copy_(t)
        self.note()
        return True


class Memo:
    """What is kept of one network; see the module.

    Args:
        network: the copy, whose parameters and buffers change at updates alone.
        precision: of the network.
    """

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        self._network, self._precision = weakref.ref(network), precision  # whose parts hold this: all is freed at once
        self._kept: dict[Any, _Kept | None] = {}  # None: it cannot be kept
        self._variants: Counter[Any] = Counter()  # by operator and tensors
        self._open: set[int] = set()  # tensors that may be written into without a trace
        self._stock: dict[int, Tensor] | None = None  # since the last update nobody has asked

    @property
    def _still(self) -> dict[int, Tensor]:
        """Tensors that stand still, by identity. It holds them, so no other tensor gets that."""
        if (stock := self._stock) is None:  # which an update in another thread may forget
            network = self._network()
            tensors = () if network is None else (*network.parameters(), *network.buffers())
            stock = {id(t): t for t in tensors if t.layout is torch.strided and id(t) not in self._open}
            self._stock = stock
        return stock

    def __call__(self) -> None:
        """Compute all that is kept again, or forget it: then the next pass keeps it anew."""
        kept, self._kept, self._stock = self._kept, {}, None
        self._variants = Counter(one.variant for one in tuple(kept.values()) if one is not None)
        for key, one in tuple(kept.items()):
            if one is None:
                self._kept[key] = None
            elif one.asked and self._all_still(one.reads):
                with refusals_borne():  # other shapes may have gone in
                    if one.compute():
                        self._keep(key, one)

    def run(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: set[Any]
    ) -> tuple[Any, bool]:
        """What the call gives, and whether that took something that is kept and is more than a view.

        ``given`` is what one call of a module has got so far: it may write into one of two that it has made alike.
        """
        reads = list(tensors_of((args, kwargs)))
        for tensor in opened_by(function, args, kwargs):
            self._give_up(tensor)
        if not reads or not self._all_still(reads):
            prepared = self._prepared(function, args)
            return function(*prepared, **kwargs), prepared is not args
        try:
            key = function, self._lowered(), key_for(args), key_for(kwargs)
        except NoKeyError:
            return function(*args, **kwargs), False
        if key not in self._kept:
            given.add(key)
            return self._first(key, function, args, kwargs, reads)
        one = self._kept[key]
        if one is not None and one.holds():
            if key in given and not one.is_view:
                return function(*args, **kwargs), False
            given.add(key)
            one.asked = True
            return one.result, not one.is_view
        if one is not None:
            self._kept[key] = None
            self._forget(*one.writes)
        return function(*args, **kwargs), False

    def _first(
        self, key: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], reads: list[Tensor]
    ) -> tuple[Any, bool]:
        """Call it, and keep what it gives if that is a function of the arguments alone."""
        if torch.is_inference_mode_enabled() or self._is_recording():
            return function(*args, **kwargs), False
        in_c = isinstance(function, _IN_C) and all(map(_is_plain, reads))
        states = states_of_torch if in_c else generator_states
        versions, drawn = [t._version for t in reads], states(self._precision.device)
        result = function(*args, **kwargs)
        changed = [t for t, version in zip(reads, versions, strict=True) if t._version != version]
        self._forget(*changed)
        self._kept[key] = None
        writes = list(tensors_of(result))
        if changed or not writes or drawn != states(self._precision.device):
            return result, False
        if any(t.requires_grad or t.layout is not torch.strided for t in writes):  # a graph serves one backward pass
            return result, False
        if not all(map(_is_plain, writes)):
            return result, False
        one = _Kept(function, args, kwargs, reads, result, writes, self._lowered())
        if one.is_chosen:
            return result, False
        self._variants[one.variant] += 1
        if self._variants[one.variant] > _VARIANTS:
            self._kept.pop(key, None)
            return result, False
        one.versions[: len(reads)] = versions  # another thread may have updated them in between
        self._keep(key, one)
        return result, not one.is_view

    def _prepared(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a product, its weight cast and laid out once instead of in every call."""
        if function not in _PRODUCTS or len(args) < 2 or id(args[1]) not in self._still:
            return args
        weight: Tensor = args[1]
        lowered = None if weight.dtype == torch.float64 else self._lowered()  # autocast leaves float64 as it is
        dtype, form = lowered or weight.dtype, self._precision.memory_format(weight.ndim)
        if weight.dtype == dtype and weight.is_contiguous(memory_format=form):
            return args
        cast, _ = self.run(Tensor.to, (weight, dtype), {"memory_format": form}, set())
        return args[0], cast, *args[2:]

    def _lowered(self) -> torch.dtype | None:
        device = self._precision.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def _is_recording(self) -> bool:
        return self._precision.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _all_still(self, tensors: list[Tensor]) -> bool:
        return all(id(t) in self._still for t in tensors)

    def _forget(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._still.pop(id(tensor), None)

    def _give_up(self, opened: Tensor) -> None:
        """Keep nothing any more that shares the memory of a tensor, views and what they are of included."""
        shared = [t for t in tuple(self._still.values()) if _memory(t) == _memory(opened)]
        self._open.update(map(id, shared))
        self._forget(*shared)
        for key, one in tuple(self._kept.items()):
            if one is not None and any(_memory(t) == _memory(opened) for t in one.writes):
                self._kept[key] = None

    def _keep(self, key: Any, one: _Kept) -> None:
        self._kept[key] = one
        for tensor in one.writes:
            mark_rewritten(tensor)
        self._still.update({id(t): t for t in one.writes})


def _is_plain(tensor: Tensor) -> bool:
    """Whether no operator on it runs code of a class of its own."""
    return type(tensor) in (Tensor, nn.Parameter)


def _memory(tensor: Tensor) -> int | None:
    with torch._C.DisableTorchFunction():  # the mode of a module around this one looks at nothing here
        return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else None
