"""Samples that a pass has lost to infinity or NaN, run again in full precision."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from ..boundary import Crossing, Pulled, Run
from ..modules import random_state_kept, refusals_borne
from .audit import Gradients, Problem
from .nearness import FAR, is_near
from .samples import are_rows


@dataclass
class Mender:
    """Gradients of samples that lost entries, from the twin.

    A lower scale comes too late for an attack of one step, and for a momentum, which divides by the size of a gradient
    that is zero by then.

    Attributes:
        twin: the run of the call in full precision.
        crossing: of its passes.
        tensors: the inputs.
        needs: which of them want a gradient.
        grads: what came in at the outputs.
        outputs: what the pass gave.
    """

    twin: Run
    crossing: Crossing
    tensors: Sequence[Tensor]
    needs: Sequence[bool]
    grads: Gradients
    outputs: Sequence[Tensor]

    def __call__(self, pulled: Pulled, lost: Tensor) -> Pulled:
        """The gradients with these samples mended. Waits for the device.

        They are run alone, but with all others if samples see each other, or if the model refuses so few. What the twin
        gives other outputs for (another draw of a random model), and what it loses too, is left as it is.
        """
        found = pulled.gradients
        fits = are_rows(found) and len(lost) == len(found[0])
        apart = fits and self.crossing.rows.apart([g is not None for g in self.grads])
        whole = Problem(self.twin, [t.detach() for t in self.tensors], self.needs, self.grads, apart)
        index = lost.nonzero().flatten()
        better = self._run(whole.part(index)) if apart else None
        if better is None:
            better = self._run(replace(whole, tensors=[t.clone() for t in whole.tensors]))
            if better is None or better.spoilt is None or not fits:
                return better or pulled
            better = Pulled([g.index_select(0, index) for g in better.gradients], better.spoilt.index_select(0, index))
        taken = ~cast(Tensor, better.spoilt)
        index, gradients = index[taken], [e[taken] for e in better.gradients]
        mended = [g.index_copy(0, index, e.to(g.dtype)) for g, e in zip(found, gradients, strict=True)]
        return Pulled(mended, cast(Tensor, pulled.spoilt).index_fill(0, index, value=False))

    def _run(self, problem: Problem) -> Pulled | None:
        """The gradients of the twin; None if it refuses these samples, or gives other outputs than the pass did."""
        with refusals_borne(), random_state_kept(self.crossing.state.device), self.crossing.state.kept():
            tape = self.twin.record(problem.tensors, self.needs, replace(self.crossing, counts_outputs=False))
            rows = [o if problem.index is None else o.index_select(0, problem.index) for o in self.outputs]
            if is_near(rows, tape.output.tensors, within=FAR):
                return tape.pull(problem.grads, keep=False)
        return None


def curable(pulled: Pulled, grads: Gradients) -> Tensor | None:
    """Which samples lost entries though what came in was finite, bool (N,); None if none lost any."""
    lost = pulled.spoilt
    if lost is None or not bool(lost.any()):
        return None
    for grad in grads:
        if grad is not None and grad.ndim and len(grad) == len(lost):
            lost = lost & grad.reshape(len(grad), -1).isfinite().all(1)
    return lost
