"""Samples that a pass has lost to infinity or NaN, run again in full precision."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor

from ..boundary import Crossing, Pulled, Run
from ..modules import is_out_of_memory, random_state_kept
from .audit import Gradients, Problem


def mend(
    twin: Run, crossing: Crossing, tensors: Sequence[Tensor], needs: Sequence[bool], grads: Gradients, pulled: Pulled
) -> Pulled:
    """The same gradients, but for samples that lost entries those of the twin; all are, if samples see each other.

    A lower scale comes too late for an attack of one step, and for a momentum, which divides by the size of a gradient
    that is zero by then. Waits for the device.
    """
    broken, found = pulled.broken, pulled.gradients
    if broken is None or not bool(broken.any()):
        return pulled
    apart = are_rows(found) and broken.shape == found[0].shape[:1]
    problem = Problem(twin, [t.detach().clone() for t in tensors], needs, grads, apart)
    problem = problem.part(broken.nonzero().flatten()) if apart else problem
    try:
        with random_state_kept(tensors[0].device), crossing.state.kept():
            tape = twin.record(problem.tensors, needs, replace(crossing, counts_outputs=False))
            better = cast(Pulled, tape.pull(problem.grads, keep=False))  # None only of a tape that is used up
    except Exception as error:  # the model takes batches of one size only
        if is_out_of_memory(error):
            raise
        return pulled
    if problem.index is None or better.broken is None:
        return better
    gradients = [g.index_copy(0, problem.index, e.to(g.dtype)) for g, e in zip(found, better.gradients, strict=True)]
    return Pulled(gradients, broken.index_copy(0, problem.index, better.broken))


def are_rows(gradients: Sequence[Tensor]) -> bool:
    """Whether these have a row for each sample."""
    return all(g.ndim > 1 for g in gradients) and len({len(g) for g in gradients}) == 1
