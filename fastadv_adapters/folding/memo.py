"""What modules compute from their weights alone, computed once per update instead of in every pass.

Weight standardisation, weight and spectral norm, and tables of relative positions are of this kind. The module's own
code runs as ever. A ``TorchFunctionMode`` looks at each operator that it calls: if all tensors that go in stand still
between updates, the result is kept, stands still too, and is what the next such call gets. So the code may branch,
count or print as it likes, and whatever it computes from an input it computes anew.

What one call of a module makes is staged, and kept once that call has returned: until then the code may write into it,
and another thread's call must not get it.

An update computes all that is kept again, in the order in which it was first, into the same tensors: whoever has
recorded their addresses (a CUDA graph) reads the new values.
"""

import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..boundary import mark_rewritten, memory_of
from ..modules import Precision, generator_states, is_transformed, refusals_borne, registered_in, states_of_torch
from .kept import Kept, Stage
from .keys import NoKeyError, copied, key_for, tensors_of
from .traceless import opened_by

_VARIANTS = 8
"""So many results of one operator on the same tensors are kept: a number may be another one in each pass."""

_PRODUCTS = (F.conv1d, F.conv2d, F.conv3d, F.linear)
_IN_C = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType)
"""PyTorch's own operators, which draw from its generators alone; those written in Python are of other types."""


class Memo:
    """What is kept of one network; see the module.

    Args:
        network: the copy, whose parameters and buffers change at updates alone.
        precision: of the network.
    """

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        self._network, self._precision = weakref.ref(network), precision  # whose parts hold this: all is freed at once
        self._kept: dict[Any, Kept | None] = {}  # None: it cannot be kept
        self._variants: Counter[Any] = Counter()  # by operator and tensors
        self._open: set[int] = set()  # tensors that may be written into without a trace
        self._stock: dict[int, Tensor] | None = None  # since the last update nobody has asked
        self._stages: dict[int, Stage] = {}  # by thread

    @property
    def _still(self) -> dict[int, Tensor]:
        """Tensors that stand still, by identity. It holds them, so no other tensor gets that."""
        if (stock := self._stock) is None:  # which an update in another thread may forget
            network = self._network()
            tensors = () if network is None else registered_in(network)
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

    @contextmanager
    def staged(self) -> Iterator[None]:
        """One call of a module. What it has made is kept when the outermost one in this thread has returned."""
        thread = threading.get_ident()
        if thread in self._stages:
            yield
            return
        stage = self._stages[thread] = Stage()
        try:
            yield
        finally:
            del self._stages[thread]
        self._publish(stage)

    def _publish(self, stage: Stage) -> None:
        published = set[int]()
        for key, (one, reads) in stage.made.items():
            if key in self._kept or not self._all_still(reads, published):  # by another thread, or of what is not kept
                continue
            if one is None:
                self._kept[key] = None
            elif not one.is_outdated:
                self._variants[one.variant] += 1
                if not one.holds():
                    self._kept[key] = None
                elif self._variants[one.variant] <= _VARIANTS:
                    self._keep(key, one)
                    published.update(map(id, one.writes))

    def run(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: set[Any]
    ) -> tuple[Any, bool]:
        """What the call gives, and whether that took something that is kept and is more than a view.

        Inside of :meth:`staged` alone. ``given`` is what this call of a module has got so far: it may write into one of
        two that it has made alike.
        """
        stage = self._stages[threading.get_ident()]
        reads = list(tensors_of((args, kwargs)))
        for tensor in opened_by(function, args, kwargs):
            self._give_up(tensor)
            stage.give_up(tensor)
        if not reads or not self._all_still(reads, stage.still) or not _is_own(function):
            prepared = self._prepared(function, args)
            return function(*prepared, **kwargs), prepared is not args
        try:
            key = function, self._lowered(), key_for(args), key_for(kwargs)
        except NoKeyError:
            return function(*args, **kwargs), False
        if key not in stage.made and key not in self._kept:
            given.add(key)
            return self._first(stage, key, function, args, kwargs, reads)
        one = stage.made[key][0] if key in stage.made else self._kept.get(key)
        if one is not None and one.holds():
            if key in given and not one.is_view:
                return function(*args, **kwargs), False
            given.add(key)
            if not one.asked:
                one.asked = True
                if key not in stage.made:
                    self._keep(key, one)
            return copied(one.result), not one.is_view
        if one is not None:
            if key in stage.made:
                stage.made[key] = None, reads
            else:
                self._kept[key] = None
            self._forget(stage, one.writes)
        return function(*args, **kwargs), False

    def _first(
        self,
        stage: Stage,
        key: Any,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reads: list[Tensor],
    ) -> tuple[Any, bool]:
        """Call it, and keep what it gives if that is a function of the arguments alone."""
        if torch.is_inference_mode_enabled() or is_transformed() or self._is_recording():
            return function(*args, **kwargs), False
        in_c = isinstance(function, _IN_C) and all(map(_is_plain, reads))
        states = states_of_torch if in_c else generator_states
        versions, drawn = [t._version for t in reads], states(self._precision.device)
        own_args, own_kwargs = copied((args, kwargs))
        result = function(*args, **kwargs)
        changed = [t for t, version in zip(reads, versions, strict=True) if t._version != version]
        self._forget(stage, changed)
        stage.stage(key, None, reads)
        writes = list(tensors_of(result))
        if changed or not writes or drawn != states(self._precision.device):
            return result, False
        if any(t.requires_grad or t.layout is not torch.strided for t in writes):  # a graph serves one backward pass
            return result, False
        if not all(map(_is_plain, writes)):
            return result, False
        one = Kept(function, own_args, own_kwargs, reads, copied(result), writes, self._lowered())
        if one.is_chosen:
            return result, False
        if self._variants[one.variant] + stage.variants(one.variant) >= _VARIANTS:
            stage.made.pop(key, None)
            return result, False
        one.versions[: len(reads)] = versions  # another thread may have updated them in between
        stage.stage(key, one, reads)
        return result, not one.is_view

    def _prepared(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a product, its weight cast and laid out once instead of in every call."""
        if function not in _PRODUCTS or len(args) < 2:
            return args
        if not self._all_still(args[1:2], self._stages[threading.get_ident()].still):
            return args
        weight: Tensor = args[1]
        if not weight.is_floating_point():  # complex
            return args
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

    def _all_still(self, tensors: Sequence[Tensor], staged: Collection[int] = ()) -> bool:
        return all(id(t) in self._still or id(t) in staged for t in tensors)

    def _forget(self, stage: Stage, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self._still.pop(id(tensor), None)
            stage.still.pop(id(tensor), None)

    def _give_up(self, opened: Tensor) -> None:
        """Keep nothing any more that shares the memory of a tensor, views and what they are of included."""
        shared = [t for t in tuple(self._still.values()) if memory_of(t) == memory_of(opened)]
        self._open.update(map(id, shared))
        for tensor in shared:
            self._still.pop(id(tensor), None)
        for key, one in tuple(self._kept.items()):
            if one is not None and any(memory_of(t) == memory_of(opened) for t in one.writes):
                self._kept[key] = None

    def _keep(self, key: Any, one: Kept) -> None:
        """Keep it. What nobody has got from here does not stand still: code may make one of the last in each pass."""
        self._kept[key] = one
        for tensor in one.writes:
            mark_rewritten(tensor)
        if one.asked:
            self._still.update({id(t): t for t in one.writes})


def _is_own(function: Any) -> bool:
    """Whether it is PyTorch's: a custom operator, or a function of others, may read what changes and is no argument."""
    operator = getattr(function, "_qualified_op_name", "") or getattr(getattr(function, "_schema", None), "name", "")
    if operator:
        return operator.partition("::")[0] in ("aten", "prims")
    return isinstance(function, _IN_C) or str(getattr(function, "__module__", "")).partition(".")[0] == "torch"


def _is_plain(tensor: Tensor) -> bool:
    """Whether no operator on it runs code of a class of its own."""
    return type(tensor) in (Tensor, nn.Parameter)
