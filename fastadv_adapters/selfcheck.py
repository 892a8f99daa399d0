"""One look, on a few samples, whether the fast run computes what the wrapped model computes."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .copying import clone, copy_module
from .engines import EagerEngine
from .folding import build
from .packing import Packed
from .precision import Precision
from .tracing import Trace

_SAMPLES = 4
_LOGITS_WITHIN = 1e-3  # of the sample's largest absolute logit
_COSINE_ABOVE = 0.99  # ReLUs flip on rounding; a wrong fold shows far below

_Outcome = tuple[list[Tensor], list[Tensor]] | str
"""Outputs and input gradients, or what was raised."""


@dataclass
class Verdict:
    """What the check found.

    Attributes:
        layout_error: what the network raised channels-last and not in the contiguous layout.
        half_error: what it raised in half precision and not in full precision.
        folding_error: in which way the folded network differs from the wrapped model in float32.
        samples_coupled: whether one sample's output depends on another sample.
    """

    layout_error: str | None = None
    half_error: str | None = None
    folding_error: str | None = None
    samples_coupled: bool = False


def check(source: nn.Module, plan: Trace | None, precision: Precision, arguments: Packed) -> Verdict:
    """Compare throw-away copies of the fast network with one of ``source`` on at most four samples of a call.

    All runs start from the same random state, which is restored afterwards; no counter or buffer of the networks in
    use moves.
    """
    verdict, tensors = Verdict(), _few(arguments.tensors)
    full = replace(precision, dtype=torch.float32)

    def plain() -> _Outcome:
        return _outcome(EagerEngine(copy_module(source, clone), full, convert=False), arguments, tensors)

    def fast(precision: Precision) -> _Outcome:
        return _outcome(
            EagerEngine(build(source, plan, precision).network, precision, convert=True), arguments, tensors
        )

    reference = plain()
    if isinstance(reference, str):
        return verdict  # the model itself refuses this input: its own error is the one to show
    single = replace(precision, dtype=precision.base)
    found = fast(single)
    if isinstance(found, str) and precision.channels_last:
        contiguous = replace(single, channels_last=False)
        other = fast(contiguous)
        if not isinstance(other, str):
            verdict.layout_error, found = found, other
            precision = replace(precision, channels_last=False)
    if precision.half and not isinstance(found, str):
        half = fast(precision)
        verdict.half_error = half if isinstance(half, str) else None
    again = plain()
    if not isinstance(again, str) and _difference(again, reference) is None:  # else the model itself is random
        verdict.folding_error = _difference(found, reference)
    verdict.samples_coupled = _coupled(EagerEngine(copy_module(source, clone), full, convert=False), arguments, tensors)
    return verdict


def _few(tensors: list[Tensor]) -> list[Tensor]:
    """At most four samples, where all inputs have the same number."""
    lengths = {t.shape[:1] for t in tensors}
    return [t.detach()[:_SAMPLES].clone() if len(lengths) == 1 else t.detach().clone() for t in tensors]


def _outcome(engine: EagerEngine, arguments: Packed, tensors: list[Tensor]) -> _Outcome:
    """Outputs, and input gradients under fixed weights of the outputs; or the text of what was raised."""
    try:
        with _random_state_kept(tensors[0].device), torch.enable_grad():
            leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
            outputs = [o for o in engine.bind(arguments)(leaves).tensors if o.requires_grad]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            grads = torch.autograd.grad(outputs, wanted, [_weights(o) for o in outputs], materialize_grads=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return [o.detach() for o in outputs], list(grads)


def _weights(output: Tensor) -> Tensor:
    """Fixed weights that no symmetry of a softmax cancels, the same for every sample."""
    row = output[0] if output.ndim else output
    ramp = torch.arange(row.numel(), device=output.device, dtype=torch.float32)
    return torch.cos(1.0 + 1.7 * ramp).view(row.shape).expand_as(output).to(output.dtype)


def _difference(found: _Outcome, reference: tuple[list[Tensor], list[Tensor]]) -> str | None:
    """In words how far ``found`` is from ``reference``, or None if it is near enough."""
    if isinstance(found, str):
        return f"the folded model raised {found}"
    for ours, theirs in zip(found[0], reference[0], strict=True):
        off = _rows(ours.double() - theirs.double()).abs().amax(1)
        if bool((off > _LOGITS_WITHIN * _rows(theirs.double()).abs().amax(1) + 1e-30).any()):
            return f"the folded model's outputs differ by up to {float(off.max()):.2g} in float32"
    for ours, theirs in zip(found[1], reference[1], strict=True):
        cosine = torch.cosine_similarity(_normalised(ours), _normalised(theirs), dim=1)
        both_zero = (_rows(ours) == 0).all(1) & (_rows(theirs) == 0).all(1)
        if bool(((cosine < _COSINE_ABOVE) & ~both_zero).any()):
            return f"the folded model's gradients differ, cosine {float(cosine.min()):.3f} in float32"
    return None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.view(1, 1)


def _normalised(tensor: Tensor) -> Tensor:
    rows = _rows(tensor.double())
    return rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-300)


def _coupled(engine: EagerEngine, arguments: Packed, tensors: list[Tensor]) -> bool:
    """Whether the first sample's outputs have a gradient at another sample."""
    with _random_state_kept(tensors[0].device), torch.enable_grad():
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
        outputs = [o for o in engine.bind(arguments)(leaves).tensors if o.requires_grad and o.ndim]
        if any(len(o) != len(tensors[0]) for o in outputs) or not outputs:
            return False  # the first dimension is not the batch: the boundary scales such calls as one
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        first = [(_weights(o)[0] * o[0]).sum() for o in outputs]
        grads = torch.autograd.grad(first, wanted, materialize_grads=True)
    return any(bool(g[1:].nan_to_num(0.0, 0.0, 0.0).count_nonzero()) for g in grads)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Random generators of PyTorch, Python and NumPy as before afterwards."""
    numpy: Any = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
