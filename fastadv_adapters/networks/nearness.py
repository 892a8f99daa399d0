"""How near two outcomes of the same call are: outputs by their size, gradients by their direction."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..modules import past
from .inputs import balanced

LOGITS_WITHIN = 1e-3  # of the sample's largest absolute logit
COSINE_ABOVE = 0.99  # ReLUs flip on rounding; a wrong fold shows far below

SHARED = 0.25  # of logits: without the part that all share, they are so much smaller
FAR_BELOW = 3  # times the largest of the others, in size

FEW = 2  # entries of a sample: attacks that look at single logits read one, which may be small beside the others

OLD = 0.03  # of a sample's largest output; half precision is ten times nearer
FAR = 0.07  # likewise; benchmarks/precision/outputs.py shows what attacks lose below and above

Outcome = tuple[list[Tensor], list[Tensor]] | str
"""Outputs and input gradients, or what was raised."""


def difference(
    found: Outcome,
    reference: tuple[list[Tensor], list[Tensor]],
    moved: Sequence[Outcome] = (),
    *,
    who: str = "the folded model",
) -> str | None:
    """In words how far ``found`` is from ``reference``, or None if it is near enough.

    Args:
        found: outputs and gradients, or what was raised.
        reference: what they should be.
        moved: the reference again, each time after another change of the size of rounding; samples that one of them
            moves too far are not compared.
        who: in words, has ``found``.
    """
    if isinstance(found, str):
        return f"{who} raised {found}"
    if [t.shape for t in found[0]] != [t.shape for t in reference[0]]:
        return f"{who}'s outputs have other shapes"
    others = [outcome for outcome in moved if not isinstance(outcome, str)]
    for place, (ours, theirs) in enumerate(zip(found[0], reference[0], strict=True)):
        differ = _outputs_differ(ours, theirs)
        for outputs, _ in others:
            differ &= ~_outputs_differ(outputs[place], theirs)
        if bool(differ.any()):
            share = float(_off_by(ours, theirs)[differ].max())
            return f"{who}'s outputs differ by up to {past(share, LOGITS_WITHIN, '.2g')} of a sample's largest"
    for place, (ours, theirs) in enumerate(zip(found[1], reference[1], strict=True)):
        differ = _gradients_differ(ours, theirs)
        for _, gradients in others:
            differ &= ~_gradients_differ(gradients[place], theirs)
        if bool(differ.any()):
            cosine = float(cosines(ours, theirs)[differ].min())
            return f"{who}'s gradients differ, cosine {past(cosine, COSINE_ABOVE, '.3f')}"
    return None


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
) -> bool:
    """Whether the outputs of most samples are what they are in full precision, but for the rounding of a half one.

    Args:
        found: outputs.
        exact: those in full precision.
        within: how far they may be off, as a share of the sample's largest one.
        usual: see :func:`farthest`.
    """
    return farthest(found, exact, usual, numbers=True) <= within


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


def beyond_chance(runs: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> float:
    """By how much outputs are off in the mean of several runs, beyond three standard errors; see :func:`farthest`.

    Args:
        runs: in each of them, each output and the exact one.
    """
    found, exact = [], []
    for output in zip(*runs, strict=True):
        theirs = torch.stack([t for _, t in output])
        off = torch.stack([o for o, _ in output]) - theirs
        mean, chance = off.mean(0), 3 * off.std(0) / len(runs) ** 0.5
        exact.append(theirs.mean(0))
        found.append(exact[-1] + mean - torch.minimum(torch.maximum(mean, -chance), chance))
    return farthest(found, exact)


def off_for_loss(
    found: Sequence[Tensor], exact: Sequence[Tensor], grads: Sequence[Tensor | None], usual: Sequence[float] = ()
) -> float:
    """By how much outputs are off for the loss that the gradients at them come from; see :func:`farthest`.

    A loss that compares logits does not see a part that all of them share. If that is most of them, it hides in their
    size how far off their differences are: so these are looked at, too. So are the entries that the loss depends on, if
    there are others: boxes in pixels beside logits, say.

    Args:
        found: outputs.
        exact: those in full precision.
        grads: what came in at them.
        usual: see :func:`usual_sizes`.
    """
    sizes, spreads = usual[: len(exact)], usual[len(exact) :] or [0.0] * len(exact)
    off = [farthest(found, exact, sizes)]
    for ours, theirs, grad, spread in zip(found, exact, grads, spreads, strict=True):
        if (read := _read(theirs, grad)) is not None:
            some = read.any(1)
            own, alone = (rows(values)[some].where(read[some], 0.0) for values in (ours.detach(), theirs))
            off.append(float(off_by(own, alone)))
        if _are_logits(theirs) and balanced([grad])[0]:
            counted = theirs.isfinite() & ~_left_out(theirs)
            own, differences = _differences(ours, counted), _differences(theirs, counted)
            sizes_of_these = differences.abs().amax(1).clamp(min=spread)
            if bool(sizes_of_these.median() < SHARED * _apart(theirs, theirs)[1].median()):
                off.append(float(off_by(own, differences, spread)))
    return max(off)


def _read(values: Tensor, grad: Tensor | None) -> Tensor | None:
    """In which entries of each sample the loss moves, bool (N, entries); None if these are single ones, or all."""
    if grad is None or not values.is_floating_point() or values.ndim < 2 or not values.numel():
        return None
    read = rows(grad) != 0
    counts = read.sum(1)
    counts = counts[counts > 0]
    return read if len(counts) and FEW <= int(counts.median()) < read.shape[1] else None


def _are_logits(values: Tensor) -> bool:
    return values.ndim == 2 and values.is_floating_point() and values.numel() > 0


def _differences(logits: Tensor, counted: Tensor) -> Tensor:
    """From the mean of each row, over those that count; zero in others."""
    wide = logits.detach().double().where(counted, 0.0)
    return (wide - wide.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)).where(counted, 0.0)


def usual_sizes(values: Sequence[Tensor]) -> list[float]:
    """The mean of the samples' largest outputs, for each output of a call; and then that of differences of logits."""
    sizes = [float(_apart(v, v)[1].mean()) if v.is_floating_point() and v.numel() else 0.0 for v in values]
    logits = [(v, v.isfinite() & ~_left_out(v)) if _are_logits(v) else None for v in values]
    return sizes + [0.0 if one is None else float(_differences(*one).abs().amax(1).mean()) for one in logits]


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
