"""Whether samples see each other in a whole batch, though a few of them do not: statistics of parts of it, say."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..boundary import Ends, Packed, Rows
from ..modules import HALF, Precision, parameters_of
from .coupling import reach_others
from .samples import SAMPLES
from .trial import Trial

_MORE = 2
"""A batch so many times as large as the largest one before is looked at again."""


def is_to_be_looked_at(samples: int, before: int) -> bool:
    """Whether a batch of so many samples may show what the largest one before, and a few, have not."""
    return samples > SAMPLES and samples >= _MORE * before


def look_at_whole(
    source: nn.Module, precision: Precision, arguments: Packed, needs: Sequence[bool], rows: Rows
) -> tuple[Rows, bool]:
    """What has a row per sample in all samples of a call, and whether they reach each other.

    By one run of a throw-away copy in full precision with one backward pass; the random state is restored. The
    caller prepares for it (``trying``).

    Args:
        source: the wrapped model.
        precision: of the fast network.
        arguments: of the call.
        needs: which of their tensors want a gradient.
        rows: what a few samples have shown.
    """
    full = replace(precision, dtype=precision.base)
    in_half = any(p.dtype in HALF for p in parameters_of(source))
    for widened in (True, False) if in_half else (False,):
        try:
            return _Whole(source, arguments, arguments.tensors, needs, full, in_half=widened).look(rows)
        except Exception:  # it may cast to the dtype of its weights, or take more memory than there is
            continue
    return rows, False


class _Whole(Trial):
    """Runs of all samples of a call."""

    def look(self, rows: Rows) -> tuple[Rows, bool]:
        """See :func:`look_at_whole`."""
        if not self._reach(rows, None):
            return rows, False
        rows, cut = replace(rows, at_outputs=(False,) * len(rows.at_outputs or ())), rows.ends and rows.ends.cut
        coupled = not cut or self._reach(rows, rows.ends)
        return replace(rows, at_ends=rows.at_ends and not (cut and coupled)), coupled

    def _reach(self, rows: Rows, ends: Ends | None) -> bool:
        with self._gradients(0) as leaves:
            places = self._places(self._plain_engine(), leaves, ends)
            have = (rows.at_ends,) * len(places) if ends is not None else rows.at_outputs or ()
            return reach_others(places, have, leaves, self.batched, together=True)
