"""What the property tests share: runs of plain and fast models, and comparisons."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.strategies import Net, Recipe
from tests.support.tools import cosine, fingerprint

FLOAT64: Any = {"dtype": torch.float64, "logits_dtype": torch.float64, "engine": "eager"}
"""Options with which all can be compared to rounding. (Compiling every random network would take hours.)"""

TIGHT = 1e-8
"""How far float64 results may be apart, relative to the sample's largest entry."""


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """The model is the same after the block as before."""
    before = fingerprint(net)
    yield
    assert fingerprint(net) == before, "the wrapped model was changed"


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the input gradient of a combination that every logit enters with another weight."""
    x = x.clone().requires_grad_()
    logits = model(x)
    ramp = torch.linspace(-1, 1.5, logits.shape[1], dtype=logits.dtype)
    (gradient,) = torch.autograd.grad((logits * ramp).sum(), x)
    return logits.detach(), gradient


def in_dtype(recipe: Recipe, samples: int, dtype: torch.dtype) -> tuple[Net, Tensor]:
    """Network and inputs for a fast network in `dtype`: in float64 for that, else in float32."""
    whole = torch.float64 if dtype == torch.float64 else torch.float32
    return recipe.build().to(whole), recipe.inputs(samples).to(whole)


@functools.cache
def transposed_in_3d_is_right() -> bool:
    """Whether a transposed 3-d convolution in bfloat16, channels-last, has its own gradient.

    In PyTorch 2.6 and 2.11 it has not. Audits find that, and the network then runs in float32, with a warning.
    """
    x, weight = (torch.linspace(-1, 1, n, dtype=torch.bfloat16).cos() for n in (24, 4))
    x = x.view(3, 1, 2, 2, 2).to(memory_format=torch.channels_last_3d).requires_grad_()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        out = F.conv_transpose3d(x.to(dtype), weight.view(1, 1, 2, 1, 2).to(dtype), padding=(1, 0, 0))
        (gradient,) = torch.autograd.grad(out, x, torch.linspace(-1, 2, out.numel(), dtype=dtype).view_as(out))
        found.append(gradient)
    return bool((cosine(*found) > 0.99).all())


def peaks(rows: Tensor) -> Tensor:
    """Each sample's largest absolute entry, (N, 1)."""
    return rows.flatten(1).abs().amax(1, keepdim=True)


def moves_by(net: nn.Module, gradient: Callable[[nn.Module], Tensor], wanted: Tensor, digits: float) -> Tensor:
    """How far each sample's gradient moves, relative to its largest entry, if all weights move in their last digits.

    A gradient far below what its parts would give (the mean of normalised values is a constant) is what rounding has
    left over. It moves as far as it is long, and differs from one kernel, so from one processor, to the next.

    Args:
        net: the network, which is copied.
        gradient: gives the gradient (N, ...) of a copy.
        wanted: the gradient of ``net``.
        digits: how far each weight moves, relative to itself.
    """
    moved = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*moved.parameters(), *moved.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + digits * (2 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) - 1))
    return (peaks(gradient(moved) - wanted) / peaks(wanted)).flatten()


def rounded_by(net: nn.Module, gradient: Callable[[nn.Module], Tensor], wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """How far each sample's gradient moves, relative to its largest entry, if what the way back needs is rounded.

    The derivative of a saturated tanh is 1 - y * y: in 16 bits y may be 1, and nothing of the gradient is left.

    Args:
        net: the network.
        gradient: gives the gradient (N, ...) of a network.
        wanted: the gradient of ``net``.
        dtype: to which it is rounded.
    """
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: _rounded(kept, dtype), lambda kept: kept):
        return (peaks(gradient(net) - wanted) / peaks(wanted)).flatten()


def _rounded(kept: Tensor, dtype: torch.dtype) -> Tensor:
    return kept.to(dtype).to(kept.dtype) if kept.is_floating_point() else kept


def assert_rows_close(found: Tensor, wanted: Tensor, within: float = TIGHT) -> None:
    """Equal to rounding, measured by each sample's largest entry."""
    off = peaks(found.double() - wanted)
    assert (off <= within * peaks(wanted) + 1e-13).all(), f"off by {off.flatten().tolist()}"
