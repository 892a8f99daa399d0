"""Norms in 16 bits, and a residual stream: as PyTorch's kernels compute them if autocast does not widen their input.

On CUDA autocast hands layer, group and RMS norms float32, and they hand out float32. Given 16 bits, the same kernels
keep statistics in float32, and move half the bytes.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import HALF, Precision, autocast, is_transformed
from .prepared import SWITCHES

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _narrow(norm: Callable[..., Tensor]) -> Callable[..., Any]:
    @wraps(norm)
    def run(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, Tensor) or is_transformed():
            return norm(input, *args, **kwargs)
        # Weights have 16 bits already if the layer has its own; the input may have 32 where the stream has.
        args, kwargs = tuple(_like(input, a) for a in args), {name: _like(input, a) for name, a in kwargs.items()}
        with autocast(input.device.type, None) if input.dtype in HALF else nullcontext():
            return norm(input, *args, **kwargs)

    return run


def _like(input: Tensor, value: Any) -> Any:
    return value.to(input.dtype) if isinstance(value, Tensor) else value


NARROW: dict[Callable[..., Any], Callable[..., Any]] = {
    norm: _narrow(norm) for norm in (F.layer_norm, F.group_norm, F.rms_norm)
}
"""Norms, and what runs in their place."""


def narrow_names(module: nn.Module, precision: Precision) -> tuple[str, ...]:
    """Which parameters of this one module are kept in 16 bits, so that nothing is widened by them."""
    switches = SWITCHES.on(precision.device)
    if not precision.half or not switches.narrow_norms:
        return ()
    if type(module) in _NORMS:
        return "weight", "bias"
    if not switches.narrow_stream or not _derives_from_none(type(module)):
        return ()
    # A number without a dimension widens nothing.
    return tuple(name for name, value in module._parameters.items() if value is not None and value.ndim > 0)


def _derives_from_none(kind: type[nn.Module]) -> bool:
    """Whether this is a class of the model's own, and no layer of PyTorch's with something added."""
    return not any(base.__module__.startswith("torch.") for base in kind.__mro__ if base is not nn.Module)
