"""One look, on a few samples, whether the fast run computes what the wrapped model computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor, nn

from ..boundary import START, Packed, Rows
from ..folding import Trace
from ..modules import HALF, Precision, by_its_own_eval, left_in_training, parameters_of, past, refusals_borne
from . import remarks
from .blank import filled_in
from .half import Half
from .kinds import Kind
from .likeness import refuse_unlike
from .nearness import COSINE_ABOVE, FAR, Outcome, cosines, difference, farthest, rows
from .samples import few
from .trial import Trial

HIGHEST = 12  # the exponent that is tried first where all samples are scaled together
WIDENED_ABOVE = 0.8  # cosine of gradients in half precision and wider; rounding leaves 0.87 (depthwise, random weights)
LOST = "its gradients are infinite or NaN at every scale"
ONE_PASS = "a run takes one backward pass only, so that no scale of gradients can be looked for"
UNTRIED = 0  # in float16 that is the model's own: about what the plain model feeds in, so nothing new overflows


@dataclass
class Verdict:
    """What the check found.

    Attributes:
        plan: how to fold: as planned, or the first less daring way that computes what the wrapped model computes.
        layout_error: what the network raised channels-last and not in the contiguous layout.
        half_error: why it cannot run in a dtype, though it can in a wider one.
        tried: the dtype in which it cannot run.
        instead: the dtype in which it runs instead.
        exponent: how large gradients at the outputs may be, as a power of two, before they overflow on the way back.
        folding_error: in which way the network, folded as planned, differs from the wrapped model in float32.
        harmless: whether that is mended by taking out no means, or by not folding into Linear layers.
        unexplained: whether it differs though nothing is folded.
        samples_coupled: whether one sample's output depends on another sample.
        rows: where half precision ends, and what has a row per sample.
        in_training: the parts that the wrapped model in eval mode has in training mode.
        writes: whether the ``eval()`` of the wrapped model, which is in training mode, makes another model of it.
        refused: what the wrapped model's own copies raised, so that there was nothing to compare with.
    """

    plan: Trace | None
    layout_error: str | None = None
    half_error: str | None = None
    tried: torch.dtype = torch.float32
    instead: torch.dtype = torch.float32
    exponent: int = START
    folding_error: str | None = None
    harmless: bool = False
    unexplained: bool = False
    samples_coupled: bool = False
    rows: Rows = field(default_factory=Rows)
    in_training: list[str] = field(default_factory=list)
    writes: bool = False
    refused: str | None = None

    def kind(self, dtype: torch.dtype, *, settled: bool) -> Kind:
        """What is known from now on of calls of this kind, which run in this dtype."""
        full = self.unexplained or self.refused is not None
        return Kind(dtype, self.rows, coupled=self.samples_coupled, settled=settled, full=full)

    def said(self) -> list[tuple[str, str]]:
        """What to say of it, each with its place in the docs; without one it is only noted."""
        found = []
        if self.refused is not None:
            found.append((remarks.UNCHECKED.format(self.refused), "not-folded"))
        if self.layout_error is not None:
            found.append((remarks.NOT_CHANNELS_LAST.format(self.layout_error), "not-channels-last"))
        if self.half_error is not None:
            instead = str(self.instead).removeprefix("torch.")
            found.append((remarks.NOT_HALF.format(instead, self.tried, self.half_error), "not-half"))
        if self.folding_error is not None:
            text = remarks.DIFFERS if self.unexplained else remarks.NOT_FOLDED
            text = text.format(self.folding_error, len(self.plan.producer) if self.plan else 0)
            found.append((text, "") if self.harmless else (text, "not-folded"))
        if self.in_training:
            some = ", ".join(map(repr, self.in_training[:3])) + (", ..." if len(self.in_training) > 3 else "")
            found.append((remarks.MODES.format(some), "mixed-modes"))
        if self.writes:
            found.append((remarks.SWITCHES, "mixed-modes"))
        if self.samples_coupled:
            found.append((remarks.COUPLED, "samples-coupled"))
        return found


def check(
    source: nn.Module,
    plan: Trace | None,
    precision: Precision,
    arguments: Packed,
    needs: Sequence[bool],
    wrapped: nn.Module,
) -> Verdict:
    """Compare throw-away copies of the fast network with one of ``source`` on at most four samples of a call.

    All runs start from the same random state, which is restored afterwards; no counter or buffer of the networks in
    use moves. The caller prepares for them (``trying``).

    Args:
        source: the wrapped model, or a copy of it in eval mode.
        plan: what is to be folded.
        precision: of the fast network.
        arguments: of the call.
        needs: which of their tensors want a gradient.
        wrapped: the wrapped model itself, in the modes that it is in.

    Returns:
        What was found. If the model itself refuses the input, which the verdict says, its own error is the one to show.
    """
    full = replace(precision, dtype=precision.base)
    in_half = any(p.dtype in HALF for p in parameters_of(source))
    few_or_all = few(arguments.tensors, needs), arguments.tensors  # it may take batches of one size only
    # Weights in half precision are widened, unless the model's code itself casts to what they are.
    for tensors, widened in product(few_or_all, (True, False) if in_half else (False,)):
        verdict, trial = Verdict(plan), Trial(source, arguments, tensors, needs, full, in_half=widened)
        reference = trial.plain(looks=True)
        if not isinstance(reference, str):
            break
    refuse_unlike(trial, reference)
    if isinstance(reference, str):
        return replace(verdict, rows=Rows(at_outputs=()), refused=reference)
    found, single = _run_in_full(verdict, trial, plan, precision)
    half: Half | str | None = None
    if precision.half and not isinstance(found, str) and verdict.half_error is None:
        half = trial.half(plan, replace(precision, channels_last=single.channels_last), found[0])
        if isinstance(half, str):
            verdict.half_error, verdict.tried = half, precision.dtype
    _check_folding(verdict, trial, single, found, reference)
    if plan is not None and (filled := filled_in(source)) is not None:
        _check_filled(verdict, Trial(filled, arguments, tensors, needs, full, in_half=widened), single)
    if trial.in_half:
        native = Trial(source, arguments, tensors, needs, full, in_half=False).plain()
        _check_widening(verdict, trial, native, reference)
    _check_modes(verdict, trial, wrapped, reference)
    tried = _check_scale(verdict, trial, half, found, precision.dtype)
    if not tried and (verdict.rows.float16 or any(p.dtype == torch.float16 for p in parameters_of(source))):
        verdict.exponent = UNTRIED
    return verdict


def _run_in_full(verdict: Verdict, trial: Trial, plan: Trace | None, precision: Precision) -> tuple[Outcome, Precision]:
    """The fast network's outcome in full precision, and how it ran: otherwise than asked where it raised."""
    single = trial.full
    found = trial.fast(plan, single)
    if isinstance(found, str) and precision.channels_last:
        contiguous = replace(single, channels_last=False)
        other = trial.fast(plan, contiguous)
        if not isinstance(other, str):
            verdict.layout_error, found, single = found, other, contiguous
    if isinstance(found, str) and single.dtype == torch.float32:  # its code may cast to the float64 of its weights
        double = replace(single, dtype=torch.float64)
        other = trial.fast(plan, double)
        if not isinstance(other, str):
            verdict.half_error, verdict.instead, found, single = f"it raised {found}", double.dtype, other, double
    return found, single


def _check_modes(
    verdict: Verdict, trial: Trial, wrapped: nn.Module, reference: tuple[list[Tensor], list[Tensor]]
) -> None:
    """Is the model that is wrapped, in the modes that it is in, another function than it is in eval mode?"""
    in_training = left_in_training(wrapped)
    if in_training and difference(trial.with_training(in_training), reference) is not None:
        verdict.in_training = list(in_training)
    if (changed := by_its_own_eval(wrapped)) is not None:
        call = trial.arguments, trial.tensors, trial.needs
        asked = (Trial(model, *call, trial.full, in_half=trial.in_half) for model in (wrapped, changed))
        verdict.writes = _differ(*asked)


def _differ(one: Trial, other: Trial) -> bool:
    """Whether two models are not the same, though each of them runs."""
    outcome, changed = one.plain(), other.plain()
    if isinstance(outcome, str) or isinstance(changed, str):
        return False
    return difference(changed, outcome) is not None and one.repeats(outcome)


def _check_scale(verdict: Verdict, trial: Trial, half: Half | str | None, found: Outcome, dtype: torch.dtype) -> bool:
    """Find where half precision ends, and how large its gradients may be; whether it is half precision that runs."""
    ends = half.ends if isinstance(half, Half) else None
    verdict.rows, verdict.samples_coupled = trial.rows(ends)
    if not isinstance(half, Half) or isinstance(found, str):
        return False
    together = not verdict.rows.all_apart
    exponent, why = None, ONE_PASS
    with refusals_borne():
        exponent, why = half.largest(found[1], HIGHEST if together else START), LOST
    if exponent is None:
        verdict.half_error, verdict.tried = why, dtype
        verdict.rows, verdict.samples_coupled = trial.rows(None)
        return False
    verdict.exponent = min(exponent, START)
    verdict.rows = replace(verdict.rows, higher=max(exponent - START, 0))
    return True


def _check_folding(
    verdict: Verdict, trial: Trial, single: Precision, found: Outcome, reference: tuple[list[Tensor], list[Tensor]]
) -> None:
    """Find the most daring way of folding that computes what the wrapped model computes."""
    if difference(found, reference) is None:
        return
    if single.channels_last and not trial.repeats(reference, draws=1):
        # A random model draws in memory order: compare in the layout of the reference.
        single = replace(single, channels_last=False)
        found = trial.fast(verdict.plan, single)
        if difference(found, reference) is None:
            return
    if not trial.repeats(reference):
        return  # it is random in a way that no seed controls
    # A gradient that cancels (a mean over normalised values) is rounding, which has no direction to compare.
    moved = [trial.moved(wave) for wave in (torch.cos, torch.sin)]
    verdict.folding_error = difference(found, reference, moved)
    if verdict.folding_error is None:
        return
    if not isinstance(found, str) and _agrees_unlowered(trial, verdict.plan, single):
        verdict.folding_error = None
        return
    if verdict.plan is not None and verdict.plan.streams:
        verdict.plan = verdict.plan.without_streams()
        if difference(trial.fast(verdict.plan, single), reference, moved) is None:
            verdict.harmless = True
            return
    without_linear = verdict.plan and verdict.plan.without((nn.Linear,), trial.source)
    without_layers = verdict.plan and verdict.plan.without((nn.Module,), trial.source)
    for plan in (without_linear, without_layers, None):
        verdict.plan = plan
        if difference(trial.fast(plan, single), reference, moved) is None:
            break
    else:
        verdict.unexplained = True
    # On sequences BatchNorm1d normalises positions, not the outputs of a Linear: no fault, only not known from a trace.
    verdict.harmless = verdict.plan is not None and verdict.plan is without_linear


def _check_filled(verdict: Verdict, trial: Trial, single: Precision) -> None:
    """The same of a model that has numbers in batch norms which have seen no batch yet."""
    reference, found = trial.plain(), trial.fast(verdict.plan, single)
    if isinstance(reference, str):
        return
    if trial.lowered() and not isinstance(found, str) and farthest(found[0], reference[0]) <= FAR:
        return  # it rounds in half precision by itself, which tells nothing of a fold
    _check_folding(verdict, trial, single, found, reference)


def _check_widening(
    verdict: Verdict, trial: Trial, native: Outcome, reference: tuple[list[Tensor], list[Tensor]]
) -> None:
    """Does a model whose weights are in half precision compute something else in a wider dtype, which its code asks?"""
    if isinstance(native, str) or _lowest(native[1], reference[1], None) >= WIDENED_ABOVE:
        return
    # A gradient that cancels in float32 is rounding, which has no direction to compare.
    moved = trial.moved()
    lowest = _lowest(native[1], reference[1], None if isinstance(moved, str) else moved[1])
    if lowest < WIDENED_ABOVE:
        verdict.unexplained, verdict.harmless = True, False
        verdict.folding_error = (
            f"in the dtype of its own weights the model's gradients have a cosine of {past(lowest, WIDENED_ABOVE)} "
            f"with those in float32"
        )


def _lowest(native: list[Tensor], reference: list[Tensor], moved: list[Tensor] | None) -> float:
    """The lowest cosine of gradients in half precision with those in float32, each of the median sample.

    Samples without a gradient in half precision tell nothing; nor do those whose gradient in float32 turns if the
    weights move in their last digits.
    """
    found = []
    for ours, theirs, other in zip(native, reference, moved or reference, strict=True):
        certain = (rows(ours) != 0).any(1) & (cosines(other, theirs) >= COSINE_ABOVE)
        found.append(float(cosines(ours, theirs)[certain].nanmedian()) if bool(certain.any()) else 1.0)
    return min(found, default=1.0)


def _agrees_unlowered(trial: Trial, plan: Trace | None, single: Precision) -> bool:
    """Whether a model that runs in half precision by itself, which rounds more than a fold does, agrees in float64."""
    if trial.in_half or not trial.lowered():
        return False
    wide = trial.wide()
    reference = wide.plain()
    if isinstance(reference, str):
        return False
    return difference(wide.fast(plan, replace(single, dtype=torch.float64)), reference) is None
