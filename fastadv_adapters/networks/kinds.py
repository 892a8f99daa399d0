"""What is known of each kind of call: a verdict belongs to the kind that it was made for."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from ..boundary import Crossing, LossScale, Packed, Rows, State
from .glimpse import Glimpse
from .inputs import Heard
from .schedule import Schedule

MOST_KINDS = 64
"""So many kinds of calls are known at once: a text that differs from call to call makes each call another kind."""

T = TypeVar("T")


def remember(known: dict[Any, T], key: Any, value: T) -> T:
    """Keep what is known of another kind of call; the oldest is forgotten for it if there are too many."""
    if key not in known and len(known) >= MOST_KINDS:
        known.pop(next(iter(known)), None)
    known[key] = value
    return value


@dataclass
class Kind:
    """One kind of call.

    Attributes:
        dtype: what it runs in.
        rows: where half precision ends in it, and what has a row per sample.
        coupled: whether samples see each other in it.
        settled: whether that was found with two samples or more.
        whole: how many samples had the largest batch that was looked at as a whole.
        full: whether it runs on the full-precision twin, since the fast network differs from the model.
        schedule: when it is audited.
        doubted: whether the last audit, of few samples, has found slightly too little.
        wanting: the dtypes that an audit has found to be too little.
        glimpse: what the last audit has found, if nobody has read it yet.
        usual: how large each output was in the first audit.
        beyond: how many samples full precision could not mend either, when that was last tried.
        heard: which entries of its outputs losses have read.
    """

    dtype: torch.dtype
    rows: Rows = field(default_factory=Rows)
    coupled: bool = False
    settled: bool = False
    whole: int = 0
    full: bool = False
    schedule: Schedule = field(default_factory=Schedule)
    doubted: bool = False
    wanting: set[torch.dtype] = field(default_factory=set)
    glimpse: Glimpse | None = None
    usual: list[float] = field(default_factory=list)
    beyond: int = 0
    heard: Heard = field(default_factory=Heard)
    _tried_at: int = field(default=0, init=False)
    _crossings: dict[Any, Crossing] = field(default_factory=dict, init=False)

    @property
    def runs_in(self) -> torch.dtype:
        """What its products run in; in half precision the twin's have float32 as well."""
        return torch.promote_types(self.dtype, torch.float32) if self.full else self.dtype

    @property
    def apart(self) -> bool:
        """Whether each sample has a scale of its own."""
        return self.rows.all_apart

    @property
    def known_apart(self) -> bool:
        """Whether no sample is seen to reach another one, at the outputs or where half precision ends."""
        return not self.coupled and self.rows.at_ends and all(self.rows.at_outputs or (False,))

    def adopt(self, rows: Rows, *, coupled: bool) -> None:
        """A larger batch has shown this."""
        self.rows, self.coupled = rows, coupled
        self._crossings.clear()

    def crossing(
        self, state: State, dtype: torch.dtype, logits_dtype: torch.dtype, loss_scale: LossScale, *, full: bool
    ) -> Crossing:
        """The ways across the boundary, made once.

        Args:
            state: the memory of the model.
            dtype: what the call runs in.
            logits_dtype: dtype of its outputs.
            loss_scale: the option.
            full: whether it runs on the twin.
        """
        key = state, dtype, logits_dtype, full
        if key not in self._crossings:
            rows = replace(self.rows, ends=None) if full else self.rows
            can_overflow = dtype == torch.float16 or rows.float16
            self._crossings[key] = Crossing(logits_dtype, loss_scale, can_overflow, state, rows)
        return self._crossings[key]

    def loses_more(self, lost: int, updates: int) -> bool:
        """Whether a pass lost samples, and more of them than full precision lost when it was last tried.

        That says nothing any more after an update of the weights, and after a pass that lost none.
        """
        if not lost or updates != self._tried_at:
            self.beyond, self._tried_at = 0, updates
        return lost > self.beyond

    def has_doubts(self) -> bool:
        """Whether the last audit, which nobody has waited for, is there by now and wants a closer look; reads it."""
        if self.glimpse is None or not self.glimpse.is_there():
            return False
        glimpse, self.glimpse = self.glimpse, None
        return glimpse.is_doubtful()


def key_of(arguments: Packed, needs: Sequence[bool]) -> Any:
    """Equal for calls of one kind: the same structure, with gradients wanted at the same places.

    A call that wants no gradient at all is taken for one that wants all that it could.
    """
    return arguments.kind, tuple(needs if any(needs) else [t.is_floating_point() for t in arguments.tensors])
