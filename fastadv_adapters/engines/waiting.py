"""Whether a pass waits for the device, or copies between host and device, which no recording can hold."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..modules import OperatorMode
from .unchanging import CannotRecordError

_aten = torch.ops.aten
_NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)


def refuse_what_waits(device: torch.device) -> AbstractContextManager[Any]:
    """Raise CannotRecordError where code inside needs a value of the device, or copies to it or from it.

    A capture that comes upon the first breaks. It takes some of the second, and repeats them from memory of the host
    that is gone. ``torch.cuda.set_sync_debug_mode`` would see a little more, but raises in every thread.
    """
    return _Looking(device)


class _Looking(OperatorMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if _copies(func, args, kwargs, self._device):
            raise CannotRecordError(f"it copies between host and device (in {func})")
        if _waits(func, args, kwargs, self._device):
            raise CannotRecordError(f"it waits for the device (in {func})")
        return func(*args, **kwargs)


def _copies(func: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device) -> bool:
    if func is _aten.copy_.default:
        to, source = args[0].device, args[1].device
    elif func is _aten._to_copy.default:
        source = args[0].device
        to = kwargs.get("device") or source
    else:
        return False
    types = {to.type, source.type}
    return len(types) > 1 and device.type in types and "meta" not in types - {device.type}


def _waits(func: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device) -> bool:
    if all(t.device != device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
        return False
    if func is _aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func in _INDEXING:
        return _looks_for_indices(func, args, kwargs, device)
    return bool(_NEEDS_VALUES & set(func.tags))


def _looks_for_indices(func: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device) -> bool:
    """Whether masks have to be turned into indices, or indices be brought to the device."""
    indices = [index for index in args[1] if index is not None]
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    if func is not _aten.index.Tensor and len(masks) == len(indices) == 1 and args[2].numel() == 1:
        accumulates = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
        return bool(accumulates)  # otherwise it is a masked fill
    return bool(masks) or any(index.device != device for index in indices)
