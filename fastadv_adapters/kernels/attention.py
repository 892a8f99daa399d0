"""Attention in bfloat16 on a processor: PyTorch's own in float32, or products in 16 bits, whichever is faster.

On short sequences PyTorch's fused attention takes more than four times as long in bfloat16 as in float32. So it runs in
float32, which costs two casts and is more exact.

With AVX512-BF16 and some hundred entries products in 16 bits are faster still, if all scores are held: the samples are
taken in blocks whose scores stay in the cache. Scores and softmax are in float32, as in the fused kernel: rounded to 16
bits, large scores would be off by much more than the products are. With AMX they are not faster, for such products are
too small for its tiles.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modules import is_transformed
from . import calls

SHORT = 128**2
"""Scores of one head. Up to so many, float32 takes less time than products in 16 bits on every processor."""

LONGEST = 640**2
"""Scores of one head. With more, PyTorch's own in bfloat16 takes no longer, for its tiles save passes over memory."""

MOST = 2**24
"""Scores of one call, which the products keep for the backward pass: 64 MiB. PyTorch's own keeps none of them."""

BLOCK = 2**19
"""Scores that are computed at a time, if one sample does not have more."""


class _Attend(torch.autograd.Function):
    """Attention on (N, L, E), (N, S, E) and (N, S, V), and what is added to the scores, or None."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        kept = query.new_empty(*query.shape[:-1], key.shape[-2], dtype=torch.float32)
        output = value.new_empty(*query.shape[:-1], value.shape[-1])
        for block in _blocks(kept):
            own = None if bias is None else bias[block]
            weights = _weights(query[block], key[block], own, scale, out=kept[block])
            torch.matmul(weights.to(value.dtype), value[block], out=output[block])
        ctx.save_for_backward(query, key, value, bias, kept)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives: what was kept has no graph
            return *_gradients(query, key, value, _weights(query, key, bias, ctx.scale), grad, ctx.scale), None, None
        found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
        for block in _blocks(kept):
            parts = query[block], key[block], value[block], kept[block], grad[block]
            for tensor, part in zip(found, _gradients(*parts, ctx.scale), strict=True):
                tensor[block] = part
        return *found, None, None


def _blocks(scores: Tensor) -> list[slice]:
    size = max(1, BLOCK // max(1, math.prod(scores.shape[1:])))
    return [slice(start, start + size) for start in range(0, len(scores), size)]


def _weights(query: Tensor, key: Tensor, bias: Tensor | None, scale: float, *, out: Tensor | None = None) -> Tensor:
    """The softmax of the scores, in float32; 0 in rows that see nothing."""
    scores = _product(query, key).mul_(scale)
    if bias is None:
        return torch.softmax(scores, -1, out=out)
    weights: Tensor = torch.ops.aten._safe_softmax(scores.add_(bias), -1)
    return weights if out is None else out.copy_(weights)


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """``rows @ columns.T`` in float32, from two products that hand out 16 bits.

    The second subtracts what the first has handed out before it rounds: what it hands out is what the first has lost.
    """
    columns = columns.transpose(-2, -1)
    product = torch.bmm(rows, columns)
    return product.float().add_(torch.baddbmm(product, rows, columns, beta=-1))


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    at_weights = _product(grad, value)
    at_scores = torch.ops.aten._softmax_backward_data(at_weights, weights, -1, torch.float32).to(query.dtype)
    at_query, at_key = (at_scores @ key) * scale, (at_scores.transpose(-2, -1) @ query) * scale
    return at_query, at_key, weights.to(value.dtype).transpose(-2, -1) @ grad


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention``, otherwise if that is faster and exact enough."""
    if dropout_p or enable_gqa or (is_causal and attn_mask is not None) or not _fits(query, key, value, attn_mask):
        others: Any = {"enable_gqa": True} if enable_gqa else {}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)
    with torch.autocast("cpu", enabled=False):
        if not _do_products_pay(query, key):
            return _in_float32(query, key, value, attn_mask, is_causal, scale)
        shape = (*query.shape[:-1], key.shape[-2])
        if is_causal:
            attn_mask = torch.ones(shape[-2:], dtype=torch.bool, device="cpu").tril()
        parts = [tensor.to(torch.bfloat16).reshape(-1, *tensor.shape[-2:]) for tensor in (query, key, value)]
        bias = None if attn_mask is None else _bias(attn_mask).expand(shape).reshape(-1, *shape[-2:])
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        output: Tensor = _Attend.apply(*parts, bias, factor)  # type: ignore[no-untyped-call]
        return output.view(*query.shape[:-1], value.shape[-1])


def _do_products_pay(query: Tensor, key: Tensor) -> bool:
    """Whether products in 16 bits are faster than PyTorch's own in float32, and not too many scores would be kept."""
    each = query.shape[-2] * key.shape[-2]
    few = each * math.prod(query.shape[:-2]) <= MOST
    return calls.HAS_AVX512_BF16 and not calls.HAS_AMX and few and each > SHORT


def _in_float32(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    shape = (*query.shape[:-1], key.shape[-2])
    # The fused kernel takes four dimensions.
    q, k, v = (tensor.float().reshape(-1, *tensor.shape[-3:]) for tensor in (query, key, value))
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.float()
        mask = mask[(None,) * (4 - mask.ndim)] if len(shape) <= 4 else mask.expand(shape).reshape(-1, *shape[-3:])
    output = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale)
    return output.to(torch.bfloat16).view(*query.shape[:-1], value.shape[-1])


def _bias(mask: Tensor) -> Tensor:
    """What a mask adds to the scores: itself, or minus infinity where it is false."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device="cpu").masked_fill_(~mask, -torch.inf)


def _fits(query: Any, key: Any, value: Any, mask: Any) -> bool:
    """Whether PyTorch would run plain tensors in bfloat16 on a processor, with a gradient, and short sequences."""
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu" for tensor in tensors):
        return False
    lowered = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    dtypes = (torch.bfloat16, torch.float32) if lowered else (torch.bfloat16,)
    if any(tensor.dtype not in dtypes for tensor in (query, key, value)):
        return False
    if (
        is_transformed()
        or not torch.is_grad_enabled()
        or not any(tensor.requires_grad for tensor in (query, key, value))
    ):
        return False
    if query.ndim < 3 or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2] or query.numel() == 0:
        return False
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2] or key.numel() == 0 or value.numel() == 0:
        return False  # PyTorch's own says what is wrong
    short = query.shape[-2] * key.shape[-2] <= LONGEST
    return short and (mask is None or _is_mask(mask, (*query.shape[:-1], key.shape[-2])))


def _is_mask(mask: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a mask needs no gradient and fits scores of this shape."""
    if mask.requires_grad or mask.ndim > len(shape) or (mask.dtype != torch.bool and not mask.is_floating_point()):
        return False
    return all(own in (1, size) for own, size in zip(reversed(mask.shape), reversed(shape), strict=False))
