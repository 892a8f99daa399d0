"""How near two outcomes of the same call are: outputs by their size, gradients by their direction."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LOGITS_WITHIN = 1e-3  # of the sample's largest absolute logit
COSINE_ABOVE = 0.99  # ReLUs flip on rounding; a wrong fold shows far below

FAR_BELOW = 3  # times the largest of the others, in size

OLD = 0.03  # of a sample's largest output; half precision is ten times nearer
FAR = 0.07  # likewise; benchmarks/precision/outputs.py shows what attacks lose below and above

Outcome = tuple[list[Tensor], list[Tensor]] | str
"""Outputs and input gradients, or what was raised."""


def difference(
    found: Outcome, reference: tuple[list[Tensor], list[Tensor]], moved: Outcome | None = None
) -> str | None:
    """In words how far ``found`` is from ``reference``, or None if it is near enough.

    Args:
        found: outputs and gradients, or what was raised.
        reference: what they should be.
        moved: the reference again after a change of the size of rounding; samples that this moves too far are not
            compared. None compares all.
    """
    if isinstance(found, str):
        return f"the folded model raised {found}"
    if [t.shape for t in found[0]] != [t.shape for t in reference[0]]:
        return "the folded model's outputs have other shapes"
    nothing: tuple[list[Tensor | None], list[Tensor | None]] = ([None] * len(reference[0]), [None] * len(reference[1]))
    outputs, gradients = nothing if moved is None or isinstance(moved, str) else moved
    for ours, theirs, other in zip(found[0], reference[0], outputs, strict=True):
        differ = _outputs_differ(ours, theirs) & ~_is_rounding(_outputs_differ, other, theirs)
        if bool(differ.any()):
            share = float(_off_by(ours, theirs)[differ].max())
            return f"the folded model's outputs differ by up to {share:.2g} of a sample's largest"
    for ours, theirs, other in zip(found[1], reference[1], gradients, strict=True):
        differ = _gradients_differ(ours, theirs) & ~_is_rounding(_gradients_differ, other, theirs)
        if bool(differ.any()):
            cosine = float(cosines(ours, theirs)[differ].min())
            return f"the folded model's gradients differ, cosine {cosine:.3f}"
    return None


def _is_rounding(differ: Callable[[Tensor, Tensor], Tensor], moved: Tensor | None, theirs: Tensor) -> Tensor:
    """Which samples differ from themselves after a change of the size of rounding."""
    if moved is None:
        return torch.zeros(len(rows(theirs)), dtype=torch.bool, device=theirs.device)
    return differ(moved, theirs)


def _apart(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """By how much each sample's outputs are off at most, and its largest one, (N,); of those that are finite.

    A classifier may leave classes out by -inf, or by a number far below: the others are compared all the same.
    """
    finite = theirs.isfinite() & ~_left_out(theirs)
    off = (ours.detach().double() - theirs.double()).where(finite, 0.0)
    return rows(off).abs().amax(1), rows(theirs.double().where(finite, 0.0)).abs().amax(1)


def _left_out(values: Tensor) -> Tensor:
    """Which entries are the same number in all samples, far below all others; none if there is one sample."""
    if not values.is_floating_point() or values.ndim < 2 or len(values) < 2 or not values.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    same = (values == values[:1]).all(0, keepdim=True) & (values < 0)
    others = values.where(values.isfinite() & ~same, 0.0).abs().flatten(1).amax(1).view(-1, *(1,) * (values.ndim - 1))
    return same & (values.abs() > FAR_BELOW * others) & (others > 0)


def _off_by(ours: Tensor, theirs: Tensor) -> Tensor:
    """How far each sample's outputs are off, as a share of its largest one, float64 (N,)."""
    off, size = _apart(ours, theirs)
    return off / size.clamp(min=1e-30)


def _outputs_differ(ours: Tensor, theirs: Tensor) -> Tensor:
    """Which samples' outputs are too far apart, bool (N,)."""
    off, size = _apart(ours, theirs)
    return ~(off <= LOGITS_WITHIN * size + 1e-30)  # NaN is not near


def _gradients_differ(ours: Tensor, theirs: Tensor) -> Tensor:
    """Which samples' gradients point elsewhere, bool (N,)."""
    both_zero = (rows(ours) == 0).all(1) & (rows(theirs) == 0).all(1)
    return ~(cosines(ours, theirs) >= COSINE_ABOVE) & ~both_zero & rows(theirs).isfinite().all(1)


def cosines(ours: Tensor, theirs: Tensor) -> Tensor:
    """The cosine of each sample's two gradients, float64 (N,); NaN if one of them is not finite."""
    return torch.cosine_similarity(_normalised(ours), _normalised(theirs), dim=1)


def is_near(
    found: Sequence[Tensor],
    exact: Sequence[Tensor],
    *,
    within: float = OLD,
    usual: Sequence[float] = (),
    numbers: bool = True,
) -> bool:
    """Whether the outputs of most samples are what they are in full precision, but for the rounding of a half one.

    Args:
        found: outputs.
        exact: those in full precision.
        within: how far they may be off, as a share of the sample's largest one.
        usual: see :func:`farthest`.
        numbers: likewise.
    """
    return farthest(found, exact, usual, numbers=numbers) <= within


def farthest(
    found: Sequence[Tensor], exact: Sequence[Tensor], usual: Sequence[float] = (), *, numbers: bool = False
) -> float:
    """By how much outputs of the median sample are off, as a share of its largest one; of several outputs the most.

    Args:
        found: outputs.
        exact: those in full precision.
        usual: how large each of them usually is; see :func:`off_by`.
        numbers: whether a number for the whole call counts, such as the model's own loss: its gradient is what attacks
            go by, but it tells of other weights.
    """
    usual = usual or [0.0] * len(exact)
    pairs = [
        (ours, theirs.detach(), size)
        for ours, theirs, size in zip(found, exact, usual, strict=True)
        if theirs.is_floating_point() and theirs.numel() and (theirs.ndim or numbers)
    ]
    return max((float(off_by(*pair)) for pair in pairs), default=0.0)


def off_by(ours: Tensor, theirs: Tensor, usual: float = 0.0) -> Tensor:
    """How far the output of the median sample is off, as a share of its largest one; ().

    Of two samples in the middle it is the worse one. Where a sample's outputs are near zero, as at the boundary between
    two classes that an attack has led it to, they are compared with what is usual: the mean of all samples, or this
    size if it is larger.
    """
    off, size = _apart(ours, theirs)
    size = torch.maximum(size, size.mean()).clamp(min=max(usual, 1e-30))
    return (off / size).nan_to_num(0.0).sort().values[len(off) // 2]


def usual_sizes(values: Sequence[Tensor]) -> list[float]:
    """The mean of the samples' largest outputs, for each output of a call."""
    return [float(_apart(v, v)[1].mean()) if v.is_floating_point() and v.numel() else 0.0 for v in values]


def overflow(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    """Whether there is inf or NaN in outputs that is not in exact ones."""
    pairs = zip(outputs, exact, strict=False)
    return any(o.shape == e.shape and bool((e.isfinite() & ~o.isfinite()).any()) for o, e in pairs)


def lost(gradient: Tensor, full: Tensor) -> bool:
    """Whether a sample has entries that are not finite though in full precision all are."""
    return bool((~rows(gradient).isfinite().all(1) & rows(full).isfinite().all(1)).any())


def rows(tensor: Tensor) -> Tensor:
    """One row per sample, (N, entries); zeros if samples have no entries."""
    if not tensor.numel():
        return tensor.new_zeros(len(tensor), 1)
    return tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.view(1, 1)


def _normalised(tensor: Tensor) -> Tensor:
    wide = rows(tensor.double())
    return wide / wide.abs().amax(1, keepdim=True).clamp(min=1e-300)
