"""Throw-away copies of a model, run on a few samples of one call."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..boundary import (
    START,
    Cuts,
    Ends,
    Packed,
    Rows,
    depends_on,
    dtypes_below,
    ends_of,
    find_ends,
    is_full_above,
    mark_ends,
    matrix_calls,
    with_siblings,
)
from ..engines import EagerEngine
from ..folding import Folded, Trace, build_fast
from ..modules import (
    HALF,
    Precision,
    clone,
    copy_module,
    filled_gradients_of,
    first_line,
    generator_states,
    in_one_block,
    is_out_of_memory,
    own_dtype,
    past,
    random_state_kept,
    refusals_borne,
    registered_in,
    submodule_of,
    thaw,
    to_eval_mode,
    widened,
)
from .coupling import Seen, look, reach_others
from .half import Half, weights_for
from .nearness import FAR, Outcome, beyond_chance, difference, farthest, overflow
from .samples import batched, length_of
from .twin import Written

_RUNS = 8  # of a model whose outputs are others from run to run
_LAST_DIGITS = 4  # by so many units in the last place weights are moved, to see what rounding alone does


class Trial:
    """Runs of throw-away copies on a few samples of one call.

    Args:
        source: the wrapped model.
        arguments, tensors, needs: of the call.
        full: how copies of the model itself run.
        in_half: whether its weights, or some, are in half precision and are widened in these copies.

    Attributes:
        written: tells what the last :meth:`plain` has written into.
    """

    def __init__(
        self,
        source: nn.Module,
        arguments: Packed,
        tensors: list[Tensor],
        needs: Sequence[bool],
        full: Precision,
        *,
        in_half: bool,
    ) -> None:
        self.source, self.arguments, self.full = source, arguments, full
        self.tensors = [t.detach() for t in tensors]
        self.needs = needs if any(needs) else [t.is_floating_point() for t in tensors]
        self.batched = batched(tensors, self.needs)
        self._engine: EagerEngine | None = None
        self._seen: Seen | None = None
        self.in_half, self._dtypes = in_half, set[torch.dtype]()
        self.written: Written | None = None

    def plain(self, *, looks: bool = False) -> Outcome:
        """The wrapped model's outcome in at least float32; if it ``looks``, what that run shows of samples is kept."""
        self._engine = self._plain_engine()
        self.written = Written(self._engine.network)
        outcome = self.outcome(self._engine, looks=looks)
        if looks and isinstance(outcome, str):  # perhaps only since the same run has several backward passes
            return self.plain()
        return outcome

    def with_training(self, parts: Mapping[str, nn.Module]) -> Outcome:
        """The same with these parts of the wrapped model in training mode, by name."""
        engine = self._plain_engine()
        for name, theirs in parts.items():
            part = submodule_of(engine.network, name)
            part.training = True
            if isinstance(theirs, nn.RNNBase):
                part.dropout = theirs.dropout  # type: ignore[assignment]
        return self.outcome(engine)

    def repeats(self, reference: tuple[list[Tensor], list[Tensor]], *, draws: int = 0) -> bool:
        """Whether the wrapped model has an outcome like this again, after ``draws`` random numbers."""
        # Most do on the copy that has run. What that keeps from run to run may be why not.
        again = self._engine is not None and difference(self.outcome(self._engine, draws), reference) is None
        return again or difference(self.outcome(self._plain_engine(), draws), reference) is None

    def moved(self, wave: Callable[[Tensor], Tensor] = torch.cos) -> Outcome:
        """The wrapped model's outcome with every weight moved in its last digits, by this pattern of signs.

        What differs then is rounding.
        """
        engine = self._plain_engine()
        for tensor in registered_in(engine.network):
            if tensor.is_floating_point() and tensor.itemsize > 1:  # there is no arithmetic on floats of one byte
                signs = wave(torch.arange(tensor.numel(), device=tensor.device)).view(tensor.shape).to(tensor.dtype)
                tensor.detach().mul_(1 + _LAST_DIGITS * torch.finfo(tensor.dtype).eps * signs)
        to_eval_mode(engine.network)  # once more, for a table may be computed of them
        return self.outcome(engine)

    def lowered(self) -> bool:
        """Whether gradients passed half precision in a run so far: in an autocast region of the model's own, say."""
        return not self._dtypes.isdisjoint(HALF)

    def wide(self) -> "Trial":
        """The same in float64, which no autocast region lowers."""
        tensors = [t.double() if t.is_floating_point() else t for t in self.tensors]
        full = replace(self.full, dtype=torch.float64)
        return Trial(self.source, self.arguments, tensors, self.needs, full, in_half=self.in_half)

    def fast(self, plan: Trace | None, precision: Precision) -> Outcome:
        """The fast network's outcome."""
        return self.outcome(EagerEngine(build_fast(self.source, plan, precision).network, precision, convert=True))

    def half(self, plan: Trace | None, precision: Precision, exact: Sequence[Tensor]) -> "Half | str":
        """The fast network in half precision, where that ends, and a run of it; or why it is not to be used.

        No scale of gradients cures outputs that overflow though the ``exact`` ones do not. If outputs are far from
        these, a loss would see another model; this says nothing of a model that draws random numbers. What keeps a
        state, or has a generator of its own, is compared in the mean of several runs.
        """
        try:
            folded = build_fast(self.source, plan, precision)
            engine = EagerEngine(folded.network, precision, convert=True)
            with self._gradients(0) as leaves:
                drawn = generator_states(self.full.device)
                ends, layers = self._find_ends(engine, folded, leaves)
                outputs, cuts = self._run(engine, leaves, ends)
                wanted = [o for o in outputs if o.requires_grad]
                if overflow(wanted, exact):
                    return "its outputs overflow"
                far = farthest(wanted, exact) > FAR and drawn == generator_states(self.full.device)
                if far and (off := self._off_in_the_mean(plan, precision, ends, layers)) > FAR:
                    return f"its outputs are off by {past(off, FAR, '.0%')} of a sample's largest one"
                half = Half(ends, cuts.below or wanted, [leaf for leaf in leaves if leaf.requires_grad])
                half.gradients(START)
                return half
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return f"it raised {first_line(error)}"

    def _off_in_the_mean(
        self, plan: Trace | None, precision: Precision, ends: Ends | None, layers: Iterable[str]
    ) -> float:
        """By how much outputs in half precision are off in the mean of several runs, beyond three standard errors.

        Runs of fresh copies go in pairs: a generator that the model holds gives both the same numbers.
        """
        lower, full = build_fast(self.source, plan, precision), replace(precision, dtype=self.full.dtype)
        lower.end_at(layers)
        half = EagerEngine(lower.network, precision, convert=True)
        whole = EagerEngine(build_fast(self.source, plan, full).network, full, convert=True)
        runs: list[list[tuple[Tensor, Tensor]]] = []
        for _ in range(_RUNS):
            with self._gradients(0) as leaves:
                theirs = whole.bind(self.arguments)(leaves).tensors
            with self._gradients(0) as leaves:
                ours = self._run(half, leaves, ends)[0]
            pairs = zip(ours, theirs, strict=True)
            runs.append([(o.detach().double(), t.detach().double()) for o, t in pairs if o.requires_grad])
        return beyond_chance(runs)

    def _find_ends(
        self, engine: EagerEngine, folded: Folded, leaves: list[Tensor]
    ) -> tuple[Ends | None, Iterable[str]]:
        """Where half precision ends in this call, if nothing behind that is in half precision; and the last layers."""
        with matrix_calls(engine.network) as calls:
            outputs, _ = self._run(engine, leaves, None)
            met = find_ends([o for o in outputs if o.requires_grad], calls)
        if met is None:
            return None, ()
        found = with_siblings(met, engine.network, (name for name, _ in calls))
        folded.end_at(found.layers)
        if not found.cut:
            return found, found.layers
        for alone in (True, False) if found == met else (True,):  # how many calls there will be is not known
            ends = replace(found, alone=alone)
            with refusals_borne():  # the model may look at its own graph, or mix dtypes
                with random_state_kept(self.full.device):
                    outputs, cuts = self._run(engine, leaves, ends)
                wanted = [o for o in outputs if o.requires_grad]
                if any(t.is_complex() for t in cuts.below):
                    break
                if wanted and len(cuts.below) == len(cuts.above) and is_full_above(wanted):
                    filled_gradients_of(wanted, cuts.above or leaves, [weights_for(o) for o in wanted])
                    return ends, found.layers
        return None, found.layers

    def _run(self, engine: EagerEngine, leaves: list[Tensor], ends: Ends | None) -> tuple[list[Tensor], Cuts]:
        with ends_of(ends, self.full.device.type, cut=True) as cuts:
            return engine.bind(self.arguments)(leaves).tensors, cuts

    def rows(self, ends: Ends | None) -> tuple[Rows, bool]:
        """Which places have a row per sample: the outputs, and the ends; and whether samples reach each other there."""
        at_outputs, coupled = self._apart(None)
        rows = Rows(ends, at_outputs=at_outputs, float16=torch.float16 in self._dtypes)
        if ends is not None and ends.cut:
            at_ends, coupled = self._apart(ends)
            rows = replace(rows, at_ends=all(at_ends))
        return rows, coupled

    def _apart(self, ends: Ends | None) -> tuple[tuple[bool, ...], bool]:
        engine, seen = self._engine, self._seen
        if ends is not None or engine is None or seen is None:
            engine = self._plain_engine()
            with self._gradients(0) as leaves:
                try:
                    places = self._places(engine, leaves, ends)
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    return (), False
                seen = look(places, leaves, self.batched)
            del places, leaves  # and with them the graph
        fewer = self._lengths_without_one(engine, ends) if seen.samples > 1 else None
        # There may be fewer of them for fewer samples, as at experts that none is sent to.
        as_long, coupled = seen.as_long, seen.coupled
        shortened = as_long if fewer is None else [n == seen.samples - 1 for n in (*fewer, *[-1] * len(as_long))]
        have = [long and short for long, short in zip(as_long, shortened, strict=False)]
        if coupled and have != as_long:
            with self._gradients(0) as leaves:
                coupled = reach_others(self._places(self._plain_engine(), leaves, ends), have, leaves, self.batched)
        return tuple(row and not coupled for row in have), coupled

    def _lengths_without_one(self, engine: EagerEngine, ends: Ends | None) -> list[int] | None:
        """How long the places are with one sample less; None if the model takes batches of this size alone."""
        with refusals_borne(), self._gradients(0) as leaves:
            shorter = [t[:-1] if own else t for t, own in zip(leaves, self.batched, strict=True)]
            return [length_of(place) for place in self._places(engine, shorter, ends)]
        return None

    def _places(self, engine: EagerEngine, leaves: list[Tensor], ends: Ends | None) -> list[Tensor]:
        """In full precision, what the last layers give; the outputs if nothing follows these."""
        if ends is None or not ends.cut:
            return engine.bind(self.arguments)(leaves).tensors
        mark_ends(engine.network, ends.layers)
        return self._run(engine, leaves, ends)[1].below

    def _plain_engine(self) -> EagerEngine:
        copied = in_one_block(copy_module(self.source, clone))
        thaw(copied, self.source)
        if self.in_half or self.full.dtype == torch.float64:
            copied = widened(copied, self.full.dtype)
        return EagerEngine(copied, self.full, convert=False, native=own_dtype(copied))

    def outcome(self, engine: EagerEngine, draws: int = 0, *, looks: bool = False) -> Outcome:
        """Outputs, and input gradients under fixed weights of the outputs; or the text of what was raised.

        If it ``looks``, what this run shows of its samples is kept.
        """
        try:
            with self._gradients(draws) as leaves:
                places = engine.bind(self.arguments)(leaves).tensors
                outputs = [o for o in places if o.requires_grad and (len(places) == 1 or depends_on(o, leaves))]
                self._dtypes |= dtypes_below(outputs)
                wanted = [leaf for leaf in leaves if leaf.requires_grad]
                weights = [weights_for(o) for o in outputs]
                grads = filled_gradients_of(outputs, wanted, weights, retain_graph=looks)
                self._seen = look(places, leaves, self.batched) if looks else self._seen
        except Exception as error:
            if is_out_of_memory(error):  # says nothing of the model
                raise
            return first_line(error)
        return [o.detach() for o in outputs], grads

    @contextmanager
    def _gradients(self, draws: int) -> Iterator[list[Tensor]]:
        """Fresh leaves, with gradients enabled and the random state restored afterwards."""
        device = self.full.device
        tensors = [t.float() if self.in_half and t.dtype in HALF else t.clone() for t in self.tensors]
        with random_state_kept(device), torch.enable_grad():
            torch.rand(draws, device=device)
            yield [t.requires_grad_(need) for t, need in zip(tensors, self.needs, strict=True)]
