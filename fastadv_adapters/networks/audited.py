"""The side of the networks that is audited: what an audit may ask for, and what is said of its findings."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..boundary import Crossing, Packed, Pulled
from ..folding import Trace
from ..modules import HALF, Precision, is_in_hardware, notify, number_of_samples, random_state_kept, unhooked
from . import remarks
from .audit import Gradients
from .auditing import Auditor
from .fast import Fast
from .finding import Finding
from .inputs import balanced, glance_at
from .kinds import Kind
from .mending import Mender, curable
from .schedule import CURED
from .trying import trying
from .twin import Twin
from .whole import is_to_be_looked_at, look_at_whole


class Audited(ABC):
    """Networks whose backward passes are audited; ``findings`` has what is said of each audit that found too little."""

    source: nn.Module
    precision: Precision
    twin: Twin
    notes: list[str]
    kinds: dict[Any, Kind]
    updates: int
    writes: bool
    findings: list[str]
    _said: set[str]
    _lost: int
    _trace: Trace | None
    _lock: threading.RLock

    @property
    def dtype(self) -> torch.dtype:
        """What calls run in by now: after audits, and of several kinds of calls the widest."""
        found = [kind.runs_in for kind in tuple(self.kinds.values())]
        return max(found, key=lambda dtype: torch.finfo(dtype).bits, default=self.precision.dtype)

    def _can_overflow(self) -> bool:
        return any(kind.dtype == torch.float16 or kind.rows.float16 for kind in tuple(self.kinds.values()))

    def known_apart(self) -> bool:
        """Whether samples do not see each other in any kind of call so far, of which there is one at least."""
        return bool(self.kinds) and all(kind.known_apart for kind in tuple(self.kinds.values()))

    def check_once(self, key: Any, arguments: Packed, needs: Sequence[bool]) -> None:
        """At the first call of each kind: is the fast run right? In larger batches: do samples see each other?"""
        self._check_few(key, arguments, needs)
        samples, kind = number_of_samples(arguments.tensors), self.kinds.get(key)
        if kind is None or not is_to_be_looked_at(samples, kind.whole) or True not in needs:
            return
        with self._lock, trying(self.precision.device):
            kind.whole = samples
            if kind.coupled or not any(kind.rows.at_outputs or ()):
                return
            rows, coupled = look_at_whole(self.followed, self.precision, arguments, needs, kind.rows)
            if rows is not kind.rows:
                kind.adopt(rows, coupled=coupled)
        if coupled:
            anchor = "" if remarks.COUPLED in self._said else "samples-coupled"
            self._said.add(remarks.COUPLED)
            self.say(remarks.COUPLED, anchor)  # last, since a warning may be an error

    @abstractmethod
    def _check_few(self, key: Any, arguments: Packed, needs: Sequence[bool]) -> None:
        """The first of these, on at most four samples."""

    @abstractmethod
    def network_in(self, dtype: torch.dtype) -> Fast:
        """The fast network in this precision."""

    @property
    def failed(self) -> int:
        """How many audits have found too little."""
        return len(self.findings)

    @property
    @abstractmethod
    def followed(self) -> nn.Module:
        """A model with the weights of the last update."""

    def say(self, text: str, anchor: str) -> None:
        """Keep a note, and warn if there is an anchor: after all has been done, since a warning may be an error."""
        if text not in self.notes:
            self.notes.append(text)
        if anchor:
            notify(f"FastAttackModel of {type(self.source).__name__}: {text}", anchor)

    @abstractmethod
    def twin_is_current(self) -> bool:
        """Whether the twin runs on the weights of the last update."""

    @abstractmethod
    def refresh(self, *, unasked: bool = False) -> None:
        """Bring everything up to date."""

    def audit(
        self,
        kind: Kind,
        arguments: Packed,
        crossing: Crossing,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        grads: Gradients,
        pulled: Pulled,
        outputs: Sequence[Tensor] | None,
    ) -> Pulled:
        """What a backward pass hands out: its gradients, after an audit if one is due, with lost samples mended.

        Called for every pass in half precision.
        """
        schedule, on_host = kind.schedule, crossing.state.lost is not None
        told = (*balanced(grads), *kind.heard.numbers(grads)) if on_host else ()
        asks = (crossing.logits_dtype, *(g is not None for g in grads), *told)
        first, doubts = schedule.is_first(asks), kind.has_doubts() or kind.doubted
        doubts |= schedule.is_losing(self._lost_since(crossing.state.lost), curable=crossing.can_overflow)
        if not all(g.numel() for g in pulled.gradients):
            return pulled
        inputs = glance_at(tensors, needs) if on_host else ()
        given = partial(self._given_for, kind, arguments, crossing, tensors, outputs)
        curing = crossing.can_overflow and not (on_host and pulled.spoilt is not None and not pulled.spoilt.any())
        due = schedule.is_due(self.updates, asks, self.source, inputs, curing=curing) or doubts
        if due and not self.twin_is_current():  # weights have changed since the forward pass
            schedule.forget(asks)
            return pulled
        if due:
            auditor = self._auditor(kind, arguments, crossing, first=first)
            if _is_never_to_wait(self.precision.device) and not (first or doubts):
                kind.glimpse = auditor.glimpse(tensors, needs, grads, pulled, given())
                return pulled
            try:
                kind.doubted = False
                with unhooked():
                    pulled = auditor(tensors, needs, grads, pulled, given())
            finally:  # it may have run out of memory
                if auditor.idle:
                    schedule.forget(asks)
            kind.usual = auditor.usual
            if auditor.refused:
                self.say(remarks.NOT_AUDITED, "")
            if auditor.was_right:
                saw_lost = not (first and crossing.can_overflow)
                schedule.was_right(number_of_samples(tensors), self.source, saw_lost=saw_lost)
            if first and crossing.state.lost is None and pulled.spoilt is not None and bool(pulled.spoilt.any()):
                schedule.bring_forward(CURED)  # nothing tells of the next passes without waiting
        lost = curable(pulled, grads) if on_host else None
        count = 0 if lost is None else int(lost.sum())
        if kind.loses_more(count, self.updates) and lost is not None and self.twin_is_current():
            twin = self.twin.engine.bind(arguments)
            with unhooked():
                pulled = Mender(twin, crossing, tensors, needs, grads, given())(pulled, lost)
            kind.beyond = int((cast(Tensor, pulled.spoilt) & lost).sum())
        return pulled

    def _given_for(
        self,
        kind: Kind,
        arguments: Packed,
        crossing: Crossing,
        tensors: Sequence[Tensor],
        outputs: Sequence[Tensor] | None,
    ) -> Sequence[Tensor]:
        """The outputs of a pass; made again, and so others of a random model, if the caller has written into them."""
        if outputs is not None:
            return outputs
        run = self.network_in(kind.dtype).eager().bind(arguments)
        with random_state_kept(self.precision.device):
            return run.values(tensors, replace(crossing, counts_outputs=False)).tensors

    def _auditor(self, kind: Kind, arguments: Packed, crossing: Crossing, *, first: bool) -> Auditor:
        return Auditor(
            arguments=arguments,
            crossing=crossing,
            twin=self.twin.engine,
            mine=self.network_in(kind.dtype),
            anew=self._made_anew,
            update=self._update_late,
            others=partial(self._others, kind),
            tell=partial(self._found_wanting, kind, again=kind.doubted),
            first=first,
            usual=[] if kind.schedule.far else kind.usual,
        )

    def _lost_since(self, lost: int | None) -> int | None:
        """How many samples have been lost since this was asked last; None if that cannot be asked."""
        since = None if lost is None else max(lost - self._lost, 0)  # counts may have been reset meanwhile
        self._lost = lost or 0
        return since

    def _made_anew(self, like: Fast, *, contiguous: bool = False) -> Fast:
        """Another network of the weights as they are, which rounds as this one does if it has the same layout."""
        precision = replace(like.precision, channels_last=False) if contiguous else like.precision
        keeps, nobody = not self.writes, lambda reason, runs="eager": None
        other = Fast(self.followed, self._trace, precision, "eager", nobody, keeps=keeps)
        other.end_at(like.ends)
        return other

    def _update_late(self) -> None:
        self.refresh()
        self.say(remarks.OLD_WEIGHTS, "old-weights")

    def _others(self, kind: Kind, finding: Finding) -> Iterator[Fast]:
        """Fast networks in what may be tried instead: the other half precision if it is no slower, and float32.

        One with fewer digits has more range, so it is tried only if gradients or outputs left the range.
        """
        tried = {kind.dtype, *kind.wanting}
        digits = torch.inf if finding.left_range else torch.finfo(kind.dtype).eps
        able = [d for d in HALF if torch.finfo(d).eps <= digits and is_in_hardware(d, self.precision.device)]
        halves = [d for d in able if d not in tried]
        for dtype in (*halves, torch.float32):
            network = self.network_in(dtype)
            if kind.rows.ends is not None:
                network.end_at(kind.rows.ends.layers)
            yield network
        self.twin.thaw()

    def _found_wanting(self, kind: Kind, finding: Finding, chosen: Fast | None, *, again: bool) -> None:
        """Run this kind in the chosen network from now on, or on the twin, and say so; or look at the next pass."""
        if finding.is_slight and not again:  # one gradient may say so by chance
            kind.doubted = True  # so that the next pass is audited
            return
        was, runs_in = kind.dtype, "full precision, on the model's twin,"
        with self._lock:
            kind.wanting.add(was)
            kind.schedule.innocent = 0
            if chosen is None:  # even in full precision the fast network computes something else for these samples
                kind.dtype, kind.full = torch.float32, True
            else:
                kind.dtype, runs_in = chosen.precision.dtype, str(chosen.precision.dtype)
        text = remarks.AUDIT.format(was, finding, runs_in) + (remarks.AGAIN if finding.off or finding.overflown else "")
        self.findings.append(text)
        self.say(text, "audit-failed")


def _is_never_to_wait(device: torch.device) -> bool:
    return device.type == "cuda"
