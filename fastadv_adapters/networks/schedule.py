"""When a kind of call is audited: at first, then soon, then seldom; earlier if what it is asked for has changed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import parameters_of, registered_in
from .finding import SAMPLES
from .inputs import Glance, are_others

PASSES = 256
"""An audit is due after so many backward passes of a kind; or, if the weights have changed, after half of them."""
SOON = 64
"""The second audit is due after so many: the first may have seen what attacks do not ask for, as a warm-up does."""
PATIENCE = 2
"""After so many passes in a row that lose samples there is an audit, and then after twice as many each time."""
CURED = 4
"""In so many passes a lower scale cures most overflows."""

SETTLED = 8
"""After so many passes weights that have gone far again since the last audit bring the next one forward."""
FAR_WEIGHTS = 0.5
"""By such a share of its size, a tensor has gone far."""
_SMALL = 0.05  # tensors with smaller entries change nothing by changing
_ENTRIES = 64  # of each tensor, by which that is told


@dataclass
class Schedule:
    """When the next audit of a kind of call is due.

    Attributes:
        passes: backward passes since the last audit; None before the first.
        wait: after so many there is the next.
        looked: how many samples the last one saw; after fewer than it can see, it comes earlier.
        updates: how many updates the model had seen at the last audit.
        asked: for which gradients there has been an audit; of these outputs, in this dtype.
        weights: a few entries of each tensor at the last audit.
        seen: at how many updates these have been compared.
        far: whether they had gone far before the last audit, so that what was usual before tells nothing.
        inputs: what the inputs of the last audit were like.
        hurry: after so many passes inputs of another kind bring the next audit forward, and then after twice as many.
        lost: how many samples the last pass has lost, to infinity, NaN or zero.
        innocent: so many are lost in a pass that an audit has found to be right.
        losing: how many passes in a row have lost more.
        patience: after so many such passes there is an audit.
    """

    passes: int | None = None
    wait: int = SOON
    looked: int = SAMPLES
    updates: int = 0
    asked: set[Any] = field(default_factory=set)
    weights: Sequence[Tensor] | None = None
    seen: int = 0
    far: bool = False
    inputs: Sequence[Glance] = ()
    hurry: int = 1
    lost: int = 0
    innocent: int = 0
    losing: int = 0
    patience: int = PATIENCE

    def is_first(self, asks: Any) -> bool:
        """Whether there has been no audit of gradients like these: of these outputs, in this dtype."""
        return self.passes is None or asks not in self.asked

    def is_due(
        self, updates: int, asks: Any, source: nn.Module, inputs: Sequence[Glance] = (), *, curing: bool = False
    ) -> bool:
        """Whether the next backward pass is to be audited; counts it.

        Args:
            updates: how many the model has seen.
            asks: equal for passes that ask for the gradients of the same outputs.
            source: the wrapped model.
            inputs: what the inputs of this pass are like; nothing if that cannot be asked without waiting.
            curing: whether this pass may have overflown, so that the next ones have a lower scale.
        """
        if self.passes is not None and asks in self.asked:
            self.passes += 1
            changed = updates != self.updates
            due = self.passes >= self._wait(changed=changed) or self._are_others(inputs)
            far = self._have_gone_far(updates, source, wait=SETTLED if self.far or curing else 0)
            if not (due or far):
                return False
            self.far = far
            self.wait = PASSES
        self.asked.add(asks)
        self.passes, self.updates, self.seen, self.inputs = 0, updates, updates, inputs
        return True

    def forget(self, asks: Any) -> None:
        """The audit has told nothing: the next such pass is looked at instead."""
        self.passes = None
        self.asked.discard(asks)

    def bring_forward(self, passes: int) -> None:
        """Let the next audit come after so many passes."""
        self.passes = max(self._wait(changed=False) - passes, 0)

    def _wait(self, *, changed: bool) -> int:
        wait = min(self.wait, PASSES // 2) if changed else self.wait
        return max(wait * self.looked // SAMPLES, 1)

    def is_losing(self, lost: int | None, *, curable: bool) -> bool:
        """Whether pass after pass loses samples, and more of them than a lower scale has to cure; counts it.

        Args:
            lost: how many samples this pass has lost; None if that cannot be asked without waiting.
            curable: whether a lower scale may cure it.
        """
        if lost is None:
            return False
        self.lost = lost
        self.losing = self.losing + 1 if lost > self.innocent else 0
        if self.losing < self.patience + (CURED if curable else 0):
            return False
        self.losing, self.patience = 0, 2 * self.patience
        return True

    def was_right(self, samples: int, source: nn.Module, *, saw_lost: bool) -> None:
        """An audit has looked at so many samples, lost ones among them or not, and found nothing."""
        self.looked, self.innocent = min(samples, SAMPLES), self.lost if saw_lost else self.innocent
        self.weights = None if _waits(source) else _few_entries(source)

    def _are_others(self, inputs: Sequence[Glance]) -> bool:
        """Whether inputs are of another kind than at the last audit, and the last such surprise is long enough ago."""
        if self.passes is None or self.passes < self.hurry or not are_others(inputs, self.inputs):
            return False
        self.hurry *= 2
        return True

    def _have_gone_far(self, updates: int, source: nn.Module, *, wait: int) -> bool:
        """Whether weights are others than at the last audit; another checkpoint, say. Looked at once per update.

        Not before so many passes: in steep training weights go far all the time, and some overflows are cured.
        """
        if self.weights is None or self.passes is None or self.passes < wait or updates == self.seen:
            return False
        self.seen = updates
        before, now = self.weights, _few_entries(source)
        others = [len(t) for t in now] != [len(t) for t in before]
        return others or any(_has_gone_far(*pair) for pair in zip(now, before, strict=True))


def _has_gone_far(now: Tensor, before: Tensor) -> bool:
    moved: Tensor = now - before
    return bool(moved.norm() > FAR_WEIGHTS * (float(before.norm()) + _SMALL * len(now) ** 0.5))


def _waits(source: nn.Module) -> bool:
    return any(p.device.type != "cpu" for p in parameters_of(source))


def _is_plain(tensor: Tensor) -> bool:
    # There is no arithmetic on floats of one byte.
    return tensor.is_floating_point() and tensor.layout == torch.strided and tensor.itemsize > 1


def _few_entries(source: nn.Module) -> Sequence[Tensor]:
    """The first entries of each floating tensor, as they are now."""
    with torch.no_grad():
        tensors = [t for t in registered_in(source) if _is_plain(t) and t.numel()]
        few = [(t if t.ndim < 2 else t[0]).reshape(-1)[:_ENTRIES] for t in tensors]
        return torch.cat(few).split([len(t) for t in few]) if few else ()
