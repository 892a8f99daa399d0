"""An audit of a backward pass, and what follows from it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..boundary import Crossing, Engine, Packed, Pulled
from ..modules import number_of_samples, random_state_kept, refusals_borne
from .audit import Gradients, Problem, choose, look
from .differences import differences_of
from .drawing import SameDraws
from .fast import Fast
from .finding import SAMPLES, Finding
from .glimpse import Glimpse, take_glimpse
from .nearness import COSINE_ABOVE, FAR, LOGITS_WITHIN, OLD, is_near, off_for_loss, overflow, usual_sizes
from .overflowing import Overflown, find_overflown
from .samples import are_rows


@dataclass
class Auditor:
    """Looks at a backward pass of one call.

    Attributes:
        arguments: of the call.
        crossing: of its passes.
        twin: runs the model in full precision.
        mine: the fast network that the call runs in.
        anew: makes another one like this, from the weights as they are; contiguous, if that is asked for.
        update: brings all up to date, and says that the weights had been changed unnoticed.
        others: the fast networks that may be tried after this finding, best first; after the last the twin is left.
        tell: is told what was found to be too little, and which of these the kind of call runs in from now on; None if
            none of them is good enough.
        first: whether it is the first pass of its kind.
        usual: how large outputs were in the first audit of its kind, see :func:`usual_sizes`; nothing before.
        idle: whether the pass tells nothing: nothing came in at its outputs, or its inputs are blank, as in a warm-up.
        was_right: whether samples were looked at, and all was well.
        refused: whether the model could not be asked.
        draws: runs the model in full precision, a random one with the same numbers each time.
    """

    arguments: Packed
    crossing: Crossing
    twin: Engine
    mine: Fast
    anew: Callable[..., Fast]
    update: Callable[[], None]
    others: Callable[[Finding], Iterator[Fast]]
    tell: Callable[[Finding, Fast | None], None]
    first: bool
    usual: list[float] = field(default_factory=list)
    idle: bool = True
    was_right: bool = False
    refused: bool = False
    draws: SameDraws | None = None

    def __call__(
        self,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        grads: Gradients,
        pulled: Pulled,
        outputs: Sequence[Tensor],
    ) -> Pulled:
        """The gradients of the pass: as they came, or better ones."""
        if not any(bool(g.count_nonzero()) for g in grads if g is not None) or _are_blank(tensors):
            return pulled
        self.draws = SameDraws(self.twin.bind(self.arguments), self.crossing.state.device)
        with random_state_kept(self.crossing.state.device), self.crossing.state.kept():
            judged = self._judge(tensors, needs, grads, pulled)
            if judged is not None and len(self.usual) != 2 * len(judged[0].values):
                self.usual = usual_sizes(judged[0].values)
            if judged is not None and self._are_weights_old(judged[0], tensors, outputs):
                self.update()
                pulled = (
                    self.mine.engine.bind(self.arguments).record(tensors, needs, self.crossing).pull(grads, keep=False)
                    or pulled
                )
                judged = self._judge(tensors, needs, grads, pulled)
            elif judged is not None and self._are_values_far(judged[0], tensors, outputs):
                off = self._off(self._own_values(judged[0], outputs), judged[0])
                judged = judged[0], replace(judged[1], off=off)
            elif judged is not None and judged[1].good:
                judged = self._of_differences(judged[0]) or judged
            overflown = find_overflown(self.twin.bind(self.arguments), tensors, outputs)
            if overflown is not None:
                finding = Finding(len(overflown), 0, float("nan"), overflown=len(overflown))
            elif judged is None or judged[1].good:
                self.idle, self.was_right = False, judged is not None
                return pulled
            else:
                finding = judged[1]
            problem, values, others = judged and judged[0], finding.off > 0, self.others(finding)
            chosen = next((o for o in others if self._is_good(o, problem, overflown, values=values)), None)
            engine = self.twin if chosen is None else chosen.engine
            crossing = self.crossing if chosen is None else self._crossing(chosen)
            better = engine.bind(self.arguments).record(tensors, needs, crossing).pull(grads, keep=False)
        self.idle = False
        self.tell(finding, chosen)  # last, since a warning may be an error
        return better or pulled

    def glimpse(
        self,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        grads: Gradients,
        pulled: Pulled,
        outputs: Sequence[Tensor],
    ) -> Glimpse | None:
        """Look at the pass without waiting for the device; None if the model cannot be asked."""
        found = pulled.gradients
        index = choose(found, grads) if are_rows(found) and len(found[0]) > SAMPLES else None
        ours = found if index is None else [g.index_select(0, index) for g in found]
        with random_state_kept(self.crossing.state.device), refusals_borne():
            problem = self._problem(tensors, needs, grads, index)
            return take_glimpse(problem, ours, partial(self._own_values, problem, outputs))
        return None

    def _is_good(self, other: Fast, problem: Problem | None, overflown: Overflown | None, *, values: bool) -> bool:
        """Whether this network in another precision runs, and is good enough for the samples that were looked at."""
        with refusals_borne():  # an operator has no kernel for this dtype, say
            return self._is_near_enough(other, problem, overflown, values=values)
        return False

    def _is_near_enough(
        self, other: Fast, problem: Problem | None, overflown: Overflown | None, *, values: bool
    ) -> bool:
        if overflown is not None and overflow(self._values(other.eager(), overflown.tensors), overflown.exact):
            return False
        if problem is None:
            return True
        outputs, gradients = self._run(other, problem)
        if (values or other.precision.half) and self._off(outputs, problem) > FAR:
            return False
        finding = look(problem, gradients)
        return finding.good and (other.precision.half or not finding.cosine < COSINE_ABOVE)

    def _are_values_far(self, problem: Problem, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Whether outputs are off by more than half precision rounds, of a model that gives the same again."""
        if self._is_random():  # those with the same draws have been compared
            return False
        with refusals_borne():
            if self._off(self._own_values(problem, outputs), problem) <= FAR:
                return False
            again = self._exact_values(problem.tensors)
            return self._is_near(again, problem, LOGITS_WITHIN) and self._are_alone_the_same(problem, tensors)
        return False

    def _are_weights_old(self, problem: Problem, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Whether a network made anew is near the model and this one is not: weights were changed past PyTorch."""
        if self._is_random():  # another draw may be near by chance
            return False
        with refusals_borne():
            if self._is_near(self._own_values(problem, outputs), problem):
                return False
            anew = self._values(self.anew(self.mine).eager(), problem.tensors)
            if not (self._is_near(anew, problem) and self._are_alone_the_same(problem, tensors)):
                return False
            return self._is_near(self._exact_values(problem.tensors), problem)  # it may draw from a source of its own
        return False

    def _is_near(self, values: Sequence[Tensor], problem: Problem, within: float = OLD) -> bool:
        sizes = self.usual[: len(problem.values)]
        return is_near(values, problem.values, within=within, usual=sizes)

    def _off(self, values: Sequence[Tensor], problem: Problem) -> float:
        return off_for_loss(values, problem.values, problem.grads, self.usual)

    def _are_alone_the_same(self, problem: Problem, tensors: Sequence[Tensor]) -> bool:
        """Whether, in full precision, a few samples get by themselves what they get among all.

        They do not if a sample's place decides (noise of a generator that is seeded anew in every pass) or the whole
        batch does (an early exit that all samples must agree to): the pass cannot be judged by a few then.
        """
        samples, index = number_of_samples(tensors), problem.index
        if index is None:
            return True
        among = self._exact_values(tensors)
        pairs = [(a, v) for a, v in zip(among, problem.values, strict=False) if v.ndim and len(v) == len(index)]
        with_rows = [(a.index_select(0, index), v) for a, v in pairs if a.ndim and len(a) == samples]
        return all(is_near([a], [v], within=LOGITS_WITHIN) for a, v in with_rows)

    def _own_values(self, problem: Problem, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the pass gave for the samples of a problem."""
        if problem.index is None:
            return outputs
        samples = number_of_samples(problem.tensors)
        if all(value.ndim and len(value) == samples for value in problem.values):
            return [o.index_select(0, problem.index) for o in outputs]
        return self._values(self.mine.eager(), problem.tensors)

    def _values(self, engine: Engine, tensors: Sequence[Tensor]) -> list[Tensor]:
        crossing = replace(self.crossing, counts_outputs=False)
        return engine.bind(self.arguments).values([t.clone() for t in tensors], crossing).tensors

    def _exact_values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return self.twin.bind(self.arguments)([t.clone() for t in tensors]).tensors

    def _crossing(self, other: Fast) -> Crossing:
        can_overflow = other.precision.dtype == torch.float16 or self.crossing.rows.float16
        return replace(self.crossing, can_overflow=can_overflow)

    def _judge(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], grads: Gradients, pulled: Pulled
    ) -> tuple[Problem, Finding] | None:
        """Look at a few samples, and at all of them if a few may not be enough; None if the model cannot be asked."""
        found, spoilt = pulled.gradients, pulled.spoilt
        apart = are_rows(found)
        known = spoilt is not None and apart and spoilt.shape == found[0].shape[:1]
        lost = spoilt if spoilt is not None and known and bool(spoilt.any()) else None
        # An overflow in the first pass is cured by the scale of the next one.
        left_out = lost if self.first and self.crossing.can_overflow else None
        if apart and (len(found[0]) > SAMPLES or left_out is not None):
            index = choose(found, grads, left_out, lost)
            if not len(index):
                return None
            few = self._look(self._problem(tensors, needs, grads, index), [g.index_select(0, index) for g in found])
            if few is not None and few[1].good and few[1].lone:
                taken = torch.zeros(len(found[0]), dtype=torch.bool, device=index.device).index_fill(0, index, True)
                more = choose(found, grads, taken if left_out is None else taken | left_out, lost)
                if len(more) >= len(index):
                    both = torch.cat([index, more])
                    all_of_them = [g.index_select(0, both) for g in found]
                    few = self._look(self._problem(tensors, needs, grads, both), all_of_them) or few
            if few is not None and (few[1].good or (few[0].apart and self._are_alone_the_same(few[0], tensors))):
                return few
        judged = self._look(self._problem(tensors, needs, grads, None), found)
        self.refused = judged is None
        return judged

    def _look(self, problem: Problem, found: Sequence[Tensor]) -> tuple[Problem, Finding] | None:
        with refusals_borne():  # the model may take batches of one size only
            finding = look(problem, found)
            return self._with_same_draws(problem) if self._is_random() else (problem, finding)
        return None

    def _is_random(self) -> bool:
        return self.draws is not None and bool(self.draws.drawn)

    def _with_same_draws(self, problem: Problem) -> tuple[Problem, Finding]:
        """Look at a random model: what the pass gave had other numbers drawn than full precision has."""
        # Numbers are drawn in the order of memory.
        problem = replace(problem, tensors=[t.contiguous() for t in problem.tensors], values=[])
        outputs, gradients = self._run(self.mine, problem)
        finding = look(problem, gradients)
        off = self._off(outputs, problem)
        return problem, replace(finding, off=off) if off > FAR else finding

    def _of_differences(self, problem: Problem) -> tuple[Problem, Finding] | None:
        """Look at differences of logits, if single ones were asked for; None if these are good, too."""
        found = differences_of(problem)
        if found is None:
            return None
        other, difference = found
        pairs = zip(self._run(self.mine, problem)[1], self._run(self.mine, other)[1], strict=True)
        finding = look(difference, [one - another for one, another in pairs])
        return None if finding.good else (difference, finding)

    def _run(self, network: Fast, problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs and gradients of a network for these samples; of a random model with the draws of the twin."""
        network = self.anew(network, contiguous=True) if self._is_random() else network
        with random_state_kept(self.crossing.state.device):
            # Eager, for a recording of these few samples would serve nothing else.
            tape = network.eager().bind(self.arguments).record(problem.tensors, problem.needs, self._crossing(network))
            found = cast(Pulled, tape.pull(problem.grads, keep=False)).gradients  # None only of a tape that is used up
        return tape.output.tensors, found

    def _problem(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], grads: Gradients, index: Tensor | None
    ) -> Problem:
        apart = self.crossing.rows.apart([g is not None for g in grads])
        run = self.draws or self.twin.bind(self.arguments)
        whole = Problem(run, [t.detach() for t in tensors], needs, grads, apart)
        if index is not None:
            return whole.part(index)
        return replace(whole, tensors=[t.clone() for t in whole.tensors])


def _are_blank(tensors: Sequence[Tensor]) -> bool:
    """Whether all entries of each floating input are the same number."""
    return all(bool((t == t.reshape(-1)[:1]).all()) for t in tensors if t.is_floating_point())
