"""What is known of each kind of call: a verdict belongs to the kind that it was made for."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..boundary import Crossing, LossScale, Packed, Rows, State
from .glimpse import Glimpse

PASSES = 256
"""An audit is due after so many backward passes of a kind; or, if the weights have changed, after half of them."""


PATIENCE = 2
"""After so many passes in a row that lose samples there is an audit, and then after twice as many each time."""
CURED = 4
"""In so many passes a lower scale cures most overflows."""


@dataclass
class Kind:
    """One kind of call.

    Attributes:
        dtype: what it runs in.
        rows: where half precision ends in it, and what has a row per sample.
        coupled: whether samples see each other in it.
        settled: whether that was found with two samples or more.
        full: whether it runs on the full-precision twin, since the fast network differs from the model.
        passes: backward passes since the last audit; None before the first.
        updates: how many updates the model had seen at the last audit.
        wanting: the dtypes that an audit has found to be too little.
        glimpse: what the last audit has found, if nobody has read it yet.
        usual: how large each output was in the first audit.
        lost: how many samples had been lost, to infinity or NaN, at the last pass.
        losing: how many passes in a row have lost some.
        patience: after so many such passes there is an audit.
    """

    dtype: torch.dtype
    rows: Rows = field(default_factory=Rows)
    coupled: bool = False
    settled: bool = False
    full: bool = False
    passes: int | None = None
    updates: int = 0
    wanting: set[torch.dtype] = field(default_factory=set)
    glimpse: Glimpse | None = None
    usual: list[float] = field(default_factory=list)
    lost: int = 0
    losing: int = 0
    patience: int = PATIENCE
    _crossings: dict[Any, Crossing] = field(default_factory=dict, init=False)

    @property
    def runs_in(self) -> torch.dtype:
        """What its products run in; in half precision the twin's have float32 as well."""
        return torch.promote_types(self.dtype, torch.float32) if self.full else self.dtype

    @property
    def apart(self) -> bool:
        """Whether each sample has a scale of its own."""
        ends, outputs = self.rows.ends, self.rows.at_outputs
        return self.rows.at_ends if ends is not None and ends.cut else all(outputs or ())

    @property
    def known_apart(self) -> bool:
        """Whether no sample is seen to reach another one, at the outputs or where half precision ends."""
        return not self.coupled and self.rows.at_ends and all(self.rows.at_outputs or (False,))

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

    def has_doubts(self) -> bool:
        """Whether the last audit, which nobody has waited for, is there by now and wants a closer look; reads it."""
        if self.glimpse is None or not self.glimpse.is_there():
            return False
        glimpse, self.glimpse = self.glimpse, None
        return glimpse.is_doubtful()

    def is_losing(self, lost: int | None, *, curable: bool) -> bool:
        """Whether pass after pass loses samples, and more of them than a lower scale has to cure; counts it.

        Args:
            lost: how many samples have been lost by now; None if that cannot be asked without waiting.
            curable: whether a lower scale may cure it.
        """
        if lost is None:
            return False
        self.losing, self.lost = self.losing + 1 if lost > self.lost else 0, lost
        if self.losing < self.patience + (CURED if curable else 0):
            return False
        self.losing, self.patience = 0, 2 * self.patience
        return True

    def is_due(self, updates: int) -> bool:
        """Whether the next backward pass is to be audited; counts it."""
        if self.passes is not None:
            self.passes += 1
            if self.passes < (PASSES if updates == self.updates else PASSES // 2):
                return False
        self.passes, self.updates = 0, updates
        return True


def key_of(arguments: Packed, needs: Sequence[bool]) -> Any:
    """Equal for calls of one kind: the same structure, with gradients wanted at the same places.

    A call that wants no gradient at all is taken for one that wants all that it could.
    """
    return arguments.kind, tuple(needs if any(needs) else [t.is_floating_point() for t in arguments.tensors])
