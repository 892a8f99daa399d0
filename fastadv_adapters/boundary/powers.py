"""Exact multiplication by powers of two, over a range that no single float32 factor spans."""

import torch
from torch import Tensor

_FORMAT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


def exponent_of(values: Tensor) -> Tensor:
    """For each value v the int32 e with 2^(e-1) <= |v| < 2^e; 0 where v is zero, infinite or NaN."""
    exponent = torch.frexp(values.float() if values.dtype in (torch.float16, torch.bfloat16) else values).exponent
    return torch.where(values.isfinite(), exponent, 0)


def times_power_of_two(values: Tensor, exponent: Tensor) -> Tensor:
    """``values * 2**exponent`` in float32, or float64 where values are; exact for normal results.

    Args:
        values: (N, ...) or any shape, floating.
        exponent: int32, (N,) for one exponent per row, or () for one in all; in float32 between -252 and 254, in
            float64 between -2044 and 2046.

    ``torch.ldexp`` is not used: it computes 2**exponent first, which over- or underflows, and has no derivative for
    negative exponents.
    """
    values = values if values.dtype == torch.float64 else values.float()
    exponent = exponent.view(exponent.shape + (1,) * (values.ndim - 1)) if exponent.ndim else exponent
    # Two factors, for one alone may lie outside the range. They round only below the normal numbers.
    half = torch.div(exponent, 2, rounding_mode="floor")
    return values * power_of_two(half, values.dtype) * power_of_two(exponent - half, values.dtype)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**exponent from its bits, exactly; clamped to the normal numbers of ``dtype``."""
    integer, mantissa_bits, bias = _FORMAT[dtype]
    clamped = exponent.to(integer).clamp(1 - bias, bias)
    return ((clamped + bias) << mantissa_bits).view(dtype)
