"""The audit: half precision is judged by the gradients that an attack really asks for.

A few samples of a backward pass, half of them those with the smallest gradients, are computed in full precision as
well, from the same gradient at the outputs. What counts in the end is how far a step along either gradient takes the
loss; the direction tells that in most cases, and a step is tried where it does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..boundary import LossScale, Packed, scale, state_on
from ..modules import filled_gradients_of, number_of_samples
from .finding import LOW, MOST, NEAR, SAMPLES, Finding
from .nearness import cosines
from .samples import are_rows, as_rows, batched, length_of

MOVED = 1e-5  # relative: by so much inputs are moved, in two ways, to see which gradients are rounding
NEGLIGIBLE = 2.0**-60  # beside the largest entry: full precision itself loses what is far below
TRIED_STEP = 0.01  # of the range of the inputs, by which a step is tried

Gradients = Sequence[Tensor | None]


@dataclass
class Problem:
    """A few samples of one backward pass.

    Attributes:
        run: runs the model in full precision on tensors like these.
        tensors: the inputs.
        needs: which of them want a gradient.
        grads: what came in at the outputs.
        apart: whether each output belongs to one sample, and to no other.
        index: which samples these are of the pass, or of the problem that this is a part of; None for all.
        values: the outputs in full precision, once gradients have been asked for.
    """

    run: Callable[[Sequence[Tensor]], Packed]
    tensors: list[Tensor]
    needs: Sequence[bool]
    grads: Gradients
    apart: bool
    index: Tensor | None = None
    values: list[Tensor] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """How many there are, as the outputs tell, or else the inputs."""
        lengths = {len(g) for g in self.grads if g is not None and g.ndim}
        return lengths.pop() if len(lengths) == 1 else number_of_samples(self.tensors)

    def part(self, index: Tensor) -> "Problem":
        """These of the samples alone; what has no row per sample is left whole."""
        own = batched(self.tensors, self.needs)
        samples = len(self.wanted(self.tensors)[0])
        return Problem(
            self.run,
            [t.index_select(0, index) if row else t for t, row in zip(self.tensors, own, strict=True)],
            self.needs,
            [g.index_select(0, index) if g is not None and g.shape[:1] == (samples,) else g for g in self.grads],
            self.apart,
            index,
            [o.index_select(0, index) if o.shape[:1] == (samples,) else o for o in self.values],
        )

    def exact(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The gradients at the inputs in full precision."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, self.needs, strict=True)]
            outputs = self.run(leaves).tensors
        if tensors is self.tensors:
            self.values = [o.detach() for o in outputs]
        pairs = [(o, g) for o, g in zip(outputs, self.grads, strict=True) if g is not None and o.requires_grad]
        wanted = [leaf for leaf, need in zip(leaves, self.needs, strict=True) if need]
        # Gradients of confident samples come in at 1e-38 and below, which full precision does not bear either.
        apart = self.apart and are_rows(wanted)  # samples that reach each other, or are in one row, share a scale
        way: LossScale = "per-sample" if apart else "per-call"
        device = next((g.device for _, g in pairs), wanted[0].device)  # an input may be a number on the host
        shift = state_on(device).shift_for(way, [g for _, g in pairs], wanted)
        scaled = [scale(g, shift, way).to(o.dtype) for o, g in pairs]
        return filled_gradients_of([o for o, _ in pairs], wanted, scaled)

    def gain(self, place: int, direction: Tensor) -> Tensor:
        """For each sample, how far a step of this input along these signs takes the loss; () if there are no rows."""
        samples = length_of(self.wanted(self.tensors)[place])
        with torch.no_grad():
            after = self.run(_stepped(self, place, direction)).tensors
        return self._loss(after, samples) - self._loss(self.values, samples)

    def _loss(self, outputs: Sequence[Tensor], samples: int) -> Tensor:
        """For each sample, how far the outputs have gone along the gradient that came in; () if there are no rows."""
        pairs = [(g.double(), o.double()) for o, g in zip(outputs, self.grads, strict=True) if g is not None]
        terms = [(g * o).where(g != 0, 0.0) for g, o in pairs]  # a class may be left out, by -inf
        if all(length_of(t) == samples > 0 for t in terms):
            return torch.stack([t.reshape(samples, -1).sum(1) for t in terms]).sum(0)
        return torch.stack([t.sum() for t in terms]).sum()

    def wanted(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those of the inputs that want a gradient."""
        return [t for t, need in zip(tensors, self.needs, strict=True) if need]


@dataclass(frozen=True)
class Compared:
    """The gradients at one input, float64, with one row per sample, or in one row: (N, entries).

    Attributes:
        place: of the input among those that want a gradient.
        fast: of the fast network.
        exact: in full precision.
    """

    place: int
    fast: Tensor
    exact: Tensor


def compare(problem: Problem, found: Sequence[Tensor]) -> list[Compared]:
    """Each input by itself, for the gradient at one may be so large that it hides all others.

    Args:
        problem: the samples.
        found: the gradients of the fast network, one for each input that wants one.
    """
    fast = [g.detach().double().flatten(1) for g in as_rows(found, problem.samples)]
    exact = [e.double().reshape(f.shape) for e, f in zip(problem.exact(problem.tensors), fast, strict=True)]
    return [Compared(place, *pair) for place, pair in enumerate(zip(fast, exact, strict=True))]


def look(problem: Problem, found: Sequence[Tensor]) -> Finding:
    """Compare gradients with exact ones of the same samples; what is found at the worst input counts.

    Args:
        problem: the samples.
        found: the gradients of the fast network, one for each input that wants one.
    """
    findings = [_look_at(problem, one) for one in compare(problem, found)]
    return replace(min(findings, key=_badness), lone=any(f.lone for f in findings))


def _badness(finding: Finding) -> tuple[bool, bool, int, float, float]:
    """The worst is the least; nothing to compare is no fault."""
    cosine = finding.cosine if finding.cosine == finding.cosine else torch.inf
    return finding.good, finding.is_slight, -finding.zero, -finding.lost, cosine


def _look_at(problem: Problem, one: Compared) -> Finding:
    fast, exact = one.fast, one.exact
    here = exact.abs().amax(1) > 0
    zero = here & (fast.abs().amax(1) == 0)
    near = cosines(fast, exact)
    rest = here & ~zero
    lost = float(lost_entries(fast[rest], exact[rest]))
    finding = Finding(len(fast), int(zero.sum()), _median(near[rest]), lowest(near[rest]), lost=lost)
    if problem.apart and len(near) > 1 and not (finding.good or finding.zero):
        gain, least = _gain_of_worst(problem, one, near)
        finding = replace(finding, gain=gain, least=least)
    finding = finding if finding.good else _look_closer(problem, one)
    return replace(finding, lone=problem.apart and bool((near[rest] < LOW).any()))


def _gain_of_worst(problem: Problem, one: Compared, near: Tensor) -> tuple[float, float]:
    """What a step along the fast gradients gains for the half of the samples that they are worst for.

    The median of these, and the lowest but for those that are left out of all. NaN if one of them gains nothing along
    its exact gradient either, as it is where that is rounding: this is the cheap look, after which there is a closer
    one. Both steps are one batch, as large as that of the exact gradients.
    """
    worst = near.nan_to_num(-1.0).argsort()[: len(near) // 2]
    rest = worst[: len(near) % 2]  # an odd batch is filled up: the model may take batches of one size only
    part = problem.part(torch.cat([worst, worst, rest]))
    gains = part.gain(one.place, torch.cat([one.fast[worst], one.exact[worst], one.exact[rest]]))
    if gains.ndim == 0 or not bool((gains[len(worst) :] > 0).all()):
        return float("nan"), float("nan")
    ours, theirs = gains[: 2 * len(worst)].chunk(2)
    return _median(ours / theirs), lowest(ours / theirs, of=len(near))


def _look_closer(problem: Problem, one: Compared) -> Finding:
    """Leave out what is rounding or chance, and try a step."""
    fast, exact = one.fast, one.exact
    certain = _stays(problem, one, torch.cos) & _stays(problem, one, torch.sin)
    zero = certain & (fast.abs().amax(1) == 0)
    rest = certain & ~zero
    if not bool(certain.any()):
        return Finding(len(fast), 0, float("nan"))
    gain, least = _gain(problem, one, rest) if bool(rest.any()) else (float("nan"), float("nan"))
    near = cosines(fast, exact)[rest]
    lost = float(lost_entries(fast[rest], exact[rest]))
    return Finding(len(fast), int(zero.sum()), _median(near), lowest(near), gain, least, lost=lost)


def lost_entries(fast: Tensor, exact: Tensor) -> Tensor:
    """The share of entries that are zero here alone, and no smaller beside their row's largest than 2^-60; ()."""
    lost = (fast == 0) & (exact.abs() > NEGLIGIBLE * exact.abs().amax(1, keepdim=True))
    return lost.sum() / max(lost.numel(), 1)


def _stays(problem: Problem, one: Compared, wave: Callable[[Tensor], Tensor]) -> Tensor:
    """Which samples keep their exact gradient if the inputs move a little, by this pattern of signs; bool (N,)."""
    tensors = [_moved(t, wave) if need else t for t, need in zip(problem.tensors, problem.needs, strict=True)]
    return cosines(problem.exact(tensors)[one.place].reshape(one.exact.shape), one.exact) > NEAR


def _gain(problem: Problem, one: Compared, rest: Tensor) -> tuple[float, float]:
    """What a small step along the signs of one gradient gains, as a share of what it gains along the other.

    The median of the samples, and the lowest.
    """
    gains = [problem.gain(one.place, direction) for direction in (one.fast, one.exact)]
    if gains[0].ndim == 0:
        share = float(gains[0] / gains[1]) if bool(gains[1] > 0) else float("nan")
        return share, share
    ours, theirs = (g[rest & (gains[1] > 0)] for g in gains)
    return _median(ours / theirs), lowest(ours / theirs)


def _stepped(problem: Problem, place: int, direction: Tensor) -> list[Tensor]:
    stepped = list(problem.tensors)
    at = [number for number, need in enumerate(problem.needs) if need][place]
    move = direction.sign().reshape(stepped[at].shape).to(stepped[at].dtype)
    stepped[at] = stepped[at] + TRIED_STEP * (stepped[at].amax() - stepped[at].amin()) * move
    return stepped


def _moved(tensor: Tensor, wave: Callable[[Tensor], Tensor]) -> Tensor:
    signs = wave(torch.arange(tensor.numel(), device=tensor.device)).view(tensor.shape)
    return tensor * (1 + MOVED * signs).to(tensor.dtype)


def choose(
    gradients: Sequence[Tensor], grads: Gradients, left_out: Tensor | None = None, lost: Tensor | None = None
) -> Tensor:
    """The indices of the samples to look at; nothing waits for the device, but for samples that are left out.

    Half of them are those that half precision loses first, with the smallest gradients. They may be zero: that may be
    all there is, in every precision. The other half is spread over the rest, up to the largest gradient, and not zero
    if there are others. Samples for which nothing came in are the last to be taken.

    Args:
        gradients: at the inputs.
        grads: what came in at the outputs.
        left_out: which samples are never taken, bool (N,).
        lost: which samples lost entries, bool (N,); they are taken for zero.
    """
    peaks = _peaks(gradients)
    count = number_for(len(peaks))
    half = count // 2
    peaks = peaks if lost is None else peaks.where(~lost, 0.0)
    zero = peaks == 0
    peaks = peaks.where(~zero | (zero.cumsum(0) <= half), torch.inf)
    came_in = [g for g in grads if g is not None and g.ndim and len(g) == len(peaks)]
    if came_in:
        peaks = peaks.where(_peaks(came_in) > 0, torch.inf)
    order = peaks.argsort(stable=True)
    order = order if left_out is None else order[~left_out[order]]
    if len(order) <= count:
        return order.sort().values
    rest = ((peaks[order] < torch.inf).sum() - half).clamp(min=0)
    spread = torch.arange(1, count - half + 1, device=order.device)
    places = half - 1 + torch.maximum(spread, spread * rest // (count - half)).clamp(max=len(order) - half)
    return torch.cat([order[:half], order[places]]).sort().values


def _peaks(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of each sample, (N,)."""
    return torch.stack([t.detach().reshape(len(t), -1).abs().amax(1) for t in tensors]).amax(0)


def number_for(samples: int) -> int:
    """How many of so many samples are looked at: it costs about the same share of a pass, whatever the batch."""
    return min(max(samples // 5, SAMPLES), MOST)


def lowest(values: Tensor, of: int = 0) -> float:
    """The lowest of those that are numbers but for one in sixteen, and one at least; of one that one, of none NaN.

    Args:
        values: one for each sample.
        of: how many samples there are, if these are the worst of them.
    """
    found = values[~values.isnan()].sort().values
    left_out = max((of or len(found)) // 16, 1)
    return float(found[min(left_out, len(found) - 1)]) if len(found) else float("nan")


def _median(values: Tensor) -> float:
    """Of those that are numbers: a gradient that full precision does not bear either tells nothing."""
    return float(values.nanmedian()) if len(values) else float("nan")
