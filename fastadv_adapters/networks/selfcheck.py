"""One look, on a few samples, whether the fast run computes what the wrapped model computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..boundary import FLOOR, START, STEP, Packed
from ..engines import EagerEngine
from ..folding import Trace, build_fast
from ..modules import (
    HALF,
    Precision,
    clone,
    copy_module,
    ieee_float32,
    in_one_block,
    is_out_of_memory,
    random_state_kept,
    without_anomaly_mode,
)
from .nearness import Outcome, difference, lost

_SAMPLES = 4
_HEADROOM = 2**2  # between the gradient that is tried in half precision and the point of overflow
_LAST_DIGITS = 4  # by so many units in the last place weights are moved, to see what rounding alone does


@dataclass
class Verdict:
    """What the check found.

    Attributes:
        plan: how to fold: as planned, or the first less daring way that computes what the wrapped model computes.
        layout_error: what the network raised channels-last and not in the contiguous layout.
        half_error: what it raised in half precision and not in full precision.
        exponent: how large gradients at the outputs may be, as a power of two, before they overflow on the way back.
        folding_error: in which way the network, folded as planned, differs from the wrapped model in float32.
        harmless: whether that is mended by not folding into Linear layers.
        unexplained: whether it differs though nothing is folded.
        samples_coupled: whether one sample's output depends on another sample.
        batch_first: whether the first dimension of every output is the batch.
    """

    plan: Trace | None
    layout_error: str | None = None
    half_error: str | None = None
    exponent: int = START
    folding_error: str | None = None
    harmless: bool = False
    unexplained: bool = False
    samples_coupled: bool = False
    batch_first: bool = True


def check(source: nn.Module, plan: Trace | None, precision: Precision, arguments: Packed) -> Verdict | None:
    """Compare throw-away copies of the fast network with one of ``source`` on at most four samples of a call.

    All runs start from the same random state, which is restored afterwards; no counter or buffer of the networks in
    use moves.

    Returns:
        What was found; None if the model itself refuses the input: its own error is the one to show.
    """
    with ieee_float32(precision.device), without_anomaly_mode():
        return _check(source, plan, precision, arguments)


def _check(source: nn.Module, plan: Trace | None, precision: Precision, arguments: Packed) -> Verdict | None:
    full = replace(precision, dtype=precision.base)
    for tensors in (few(arguments.tensors), arguments.tensors):  # it may take batches of one size only
        verdict, trial = Verdict(plan), _Trial(source, arguments, tensors, full)
        reference = trial.plain()
        if not isinstance(reference, str):
            break
    else:
        return None
    single = trial.full
    found = trial.fast(plan, single)
    if isinstance(found, str) and precision.channels_last:
        contiguous = replace(single, channels_last=False)
        other = trial.fast(plan, contiguous)
        if not isinstance(other, str):
            verdict.layout_error, found, single = found, other, contiguous
    if precision.half and not isinstance(found, str):
        half = trial.half(plan, replace(precision, channels_last=single.channels_last), found[1])
        verdict.half_error, verdict.exponent = (half, START) if isinstance(half, str) else (None, half)
    _check_folding(verdict, trial, single, found, reference)
    verdict.batch_first = trial.batch_first()
    verdict.samples_coupled = verdict.batch_first and trial.coupled()
    return verdict


def _check_folding(
    verdict: Verdict, trial: "_Trial", single: Precision, found: Outcome, reference: tuple[list[Tensor], list[Tensor]]
) -> None:
    """Find the most daring way of folding that computes what the wrapped model computes."""
    if single.channels_last and difference(trial.plain(draws=1), reference) is not None:
        # A random model draws in memory order: compare in the layout of the reference.
        single = replace(single, channels_last=False)
        found = trial.fast(verdict.plan, single)
    if difference(trial.plain(), reference) is not None:
        return  # it is random in a way that no seed controls
    if difference(found, reference) is None:
        return
    # A gradient that cancels (a mean over normalised values) is rounding, which has no direction to compare.
    moved = trial.moved()
    verdict.folding_error = difference(found, reference, moved)
    if verdict.folding_error is None:
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


class _Trial:
    """Runs of throw-away copies on a few samples of one call."""

    def __init__(self, source: nn.Module, arguments: Packed, tensors: list[Tensor], full: Precision) -> None:
        self.source, self.arguments, self.full = source, arguments, full
        self.tensors = [t.detach() for t in tensors]
        self.in_half = any(p.dtype in HALF for p in source.parameters())

    def plain(self, *, draws: int = 0) -> Outcome:
        """The wrapped model's outcome in at least float32, after ``draws`` random numbers."""
        return self._outcome(self._plain_engine(), draws)

    def moved(self) -> Outcome:
        """The wrapped model's outcome with every weight moved in its last digits: what differs then is rounding."""
        engine = self._plain_engine()
        for tensor in (*engine.network.parameters(), *engine.network.buffers()):
            if tensor.is_floating_point():
                signs = torch.arange(tensor.numel(), device=tensor.device).cos().view(tensor.shape).to(tensor.dtype)
                tensor.mul_(1 + _LAST_DIGITS * torch.finfo(tensor.dtype).eps * signs)
        return self._outcome(engine)

    def fast(self, plan: Trace | None, precision: Precision) -> Outcome:
        """The fast network's outcome."""
        return self._outcome(EagerEngine(build_fast(self.source, plan, precision).network, precision, convert=True))

    def half(self, plan: Trace | None, precision: Precision, full: list[Tensor]) -> int | str:
        """The largest exponent at which no gradient overflows that is finite in full precision, or what was raised."""
        try:
            engine = EagerEngine(build_fast(self.source, plan, precision).network, precision, convert=True)
            with self._gradients(0) as leaves:
                outputs = [o for o in engine.bind(self.arguments)(leaves).tensors if o.requires_grad]
                wanted = [leaf for leaf in leaves if leaf.requires_grad]
                for exponent in range(START, FLOOR - 1, -STEP):
                    largest = _HEADROOM * 2.0 ** (exponent + 1)
                    weights = [(_weights(o).float() * largest).to(o.dtype) for o in outputs]
                    grads = torch.autograd.grad(outputs, wanted, weights, retain_graph=True, materialize_grads=True)
                    if not any(lost(g, f) for g, f in zip(grads, full, strict=True)):
                        return exponent
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {error}".split("\n")[0]
        return START  # no scale cures it

    def coupled(self) -> bool:
        """Whether the outputs of the first or of the last sample have a gradient at another sample.

        (In a sequence with time in front, each step reaches back only, or forth only.)
        """
        with self._gradients(0) as leaves:
            outputs = [o for o in self._plain_engine().bind(self.arguments)(leaves).tensors if o.requires_grad]
            wanted = [leaf for leaf in leaves if leaf.requires_grad and leaf.ndim]
            if not outputs:
                return False
            for own, others in ((0, slice(1, None)), (-1, slice(None, -1))):
                row = [(_weights(o)[own] * o[own]).sum() for o in outputs]
                grads = torch.autograd.grad(row, wanted, retain_graph=True, materialize_grads=True)
                if any(bool(g[others].nan_to_num(0.0, 0.0, 0.0).count_nonzero()) for g in grads):
                    return True
        return False

    def batch_first(self) -> bool:
        """Whether one sample less makes each output one shorter: an output may be as long as the batch by accident."""
        if len({t.shape[:1] for t in self.tensors}) != 1 or len(self.tensors[0]) < 2:
            return len({t.shape[:1] for t in self.tensors}) == 1
        lengths: list[list[int]] = []
        for less in (0, 1):
            with self._gradients(0) as leaves:
                shorter = [leaf[: len(leaf) - less] for leaf in leaves]
                try:
                    outputs = self._plain_engine().bind(self.arguments)(shorter).tensors
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    if not lengths:
                        return False
                    lengths.append([length - 1 for length in lengths[0]])  # it takes batches of this size alone
                    break
                lengths.append([o.shape[0] if o.ndim else -1 for o in outputs if o.requires_grad])
        full = len(self.tensors[0])
        return all(n == full and fewer == full - 1 for n, fewer in zip(*lengths, strict=True))

    def _plain_engine(self) -> EagerEngine:
        copied = in_one_block(copy_module(self.source, clone))
        return EagerEngine(copied.float() if self.in_half else copied, self.full, convert=False)

    def _outcome(self, engine: EagerEngine, draws: int = 0) -> Outcome:
        """Outputs, and input gradients under fixed weights of the outputs; or the text of what was raised."""
        try:
            with self._gradients(draws) as leaves:
                outputs = [o for o in engine.bind(self.arguments)(leaves).tensors if o.requires_grad]
                wanted = [leaf for leaf in leaves if leaf.requires_grad]
                weights = [_weights(o) for o in outputs]
                grads = torch.autograd.grad(outputs, wanted, weights, materialize_grads=True)
        except Exception as error:
            if is_out_of_memory(error):  # says nothing of the model
                raise
            return f"{type(error).__name__}: {error}".split("\n")[0]
        return [o.detach() for o in outputs], list(grads)

    @contextmanager
    def _gradients(self, draws: int) -> Iterator[list[Tensor]]:
        """Fresh leaves, with gradients enabled and the random state restored afterwards."""
        device = self.tensors[0].device
        tensors = [t.float() if self.in_half and t.dtype in HALF else t.clone() for t in self.tensors]
        with random_state_kept(device), torch.enable_grad():
            torch.rand(draws, device=device)
            yield [t.requires_grad_(t.is_floating_point()) for t in tensors]


def few(tensors: list[Tensor]) -> list[Tensor]:
    """At most four samples, where all inputs have the same number."""
    apart = len({t.shape[:1] for t in tensors}) == 1
    return [t.detach()[:_SAMPLES] if apart else t.detach() for t in tensors]


def _weights(output: Tensor) -> Tensor:
    """Fixed weights that no symmetry of a softmax cancels, the same for every sample."""
    row = output[0] if output.ndim else output
    ramp = torch.arange(row.numel(), device=output.device, dtype=torch.float32)
    return torch.cos(1.0 + 1.7 * ramp).view(row.shape).expand_as(output).to(output.dtype)
