"""Writes that version counters do not show."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_OPENERS = (
    *(Tensor.data.__get__, Tensor.data.__set__),  # type: ignore[attr-defined]
    *(Tensor.apply_, Tensor.map_, Tensor.map2_),
    *(Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage, Tensor.storage, Tensor.data_ptr),
)
"""What these hand out can be written into without a trace, or they write so themselves."""

_STATISTICS = ("running_mean", "running_var", "running_min", "running_max", "scale", "zero_point")
_OF_NORMS = ("input", "weight", "bias", "running_mean", "running_var", "training")
_WRITERS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training"),
    torch.batch_norm: _OF_NORMS,
    torch.native_batch_norm: _OF_NORMS,
    torch.fused_moving_avg_obs_fake_quant: ("input", "observer_on", "fake_quant_on", *_STATISTICS[2:]),
}
"""These write into running statistics and count no version, norms in training mode only; with names of arguments."""


def opened_by(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that this call writes into, or lets others write into, without a trace."""
    if function in _OPENERS:
        return [args[0]]
    if function not in _WRITERS:
        return []
    named = {"training": function is not F.batch_norm, **dict(zip(_WRITERS[function], args, strict=False)), **kwargs}
    found = [named.get(name) for name in _STATISTICS if named["training"]]
    return [t for t in found if isinstance(t, Tensor)]
