"""The two networks behind a fast model: the full-precision twin and the fast network, kept up to date in place."""

import weakref
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ..boundary import START, STEP, Engine, Packed, state_on
from ..engines import EagerEngine
from ..folding import Folded, Trace, build_fast, trace
from ..modules import EngineName, RunBy, device_of, number_of_samples, refuse_freed, refuse_unfit, resolve
from ..modules.transforms import outside_of_transforms
from . import remarks
from .audited import Audited
from .building import BuiltLater
from .fast import Fast
from .freshness import Change, Freshness
from .judging import Judges
from .kinds import Kind, remember
from .pattern import pattern_of, switched
from .paying import Choice
from .samples import few
from .selfcheck import Verdict, check
from .trying import trying
from .twin import Twin, writes_parameters


class Networks(BuiltLater, Audited):
    """Twin and fast network of one wrapped model.

    Args:
        source: the wrapped model; never touched.
        dtype: what the fast network is asked to compute in.
        channels_last: the layout asked for.
        fuse_bn: whether batch norms are folded or frozen.
        live: whether the twin runs the source's own parameters, or as they were at the last update.
        engine: the engine asked for.
        settled: see :class:`Choice`.

    Attributes:
        precision: how the fast network computes, after all that had to be done otherwise than asked.
        choice: what ``dtype="auto"`` has come to.
        kinds: what is known of each kind of call, by its key; empty before the first self-check.
        looked: whether it was found out whether the model writes into its parameters when it is run.
        writes: whether it does.
        twin: runs the wrapped model's own weights, in its own precision, in eval mode.
        fast: runs the fast network.
        judges: say what runs passes without gradient.
        updates: how often the source was followed.
        generation: counts changes of the fast network; a backward pass belongs to the generation of its forward pass.
        unfinished: whether an update was interrupted; nothing may run before the next one.
        notes: what was done otherwise than asked, for the summary.
    """

    def __init__(
        self,
        source: nn.Module,
        *,
        dtype: torch.dtype | Literal["auto"],
        channels_last: bool | Literal["auto"],
        fuse_bn: bool,
        live: bool,
        engine: EngineName,
        settled: tuple[bool, str] | None = None,
    ) -> None:
        self.source = source
        self._dtype: torch.dtype | Literal["auto"] = dtype
        self._channels_last: bool | Literal["auto"] = channels_last
        self.fuse_bn, self._live, self._engine, self._settled = fuse_bn, live, engine, settled
        self.state = state_on(device_of(source))
        self.generation = self.updates = self._lost = 0
        self.findings, self._said = list[str](), set[str]()  # the latter once, however often networks are built
        self.unfinished = False
        self._freshness = Freshness(source)
        with torch.no_grad():
            self._rebuild()

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("_dtype", "_channels_last", "fuse_bn", "_live", "_engine")
        options = {name.strip("_"): getattr(self, name) for name in names}
        return self.blank, (), (self.source, {**options, "settled": self.choice.settled})

    def refresh(self, *, unasked: bool = False) -> None:
        """Bring everything up to date with the source; ``unasked`` only if a change is noticed.

        An update that was interrupted is made good by a new build before anything is run again.
        """
        with self._lock:
            change = Change.STRUCTURE if self.unfinished else self._freshness.change(asked=not unasked)
            if unasked and change is Change.NONE:
                return
            self.unfinished = True
            self.generation += 1
            self.updates += 1
            with torch.inference_mode(False), torch.no_grad(), outside_of_transforms():
                self._follow(change)
            self.unfinished = False

    def _follow(self, change: Change) -> None:
        if change is Change.STRUCTURE:
            self._rebuild()
            return
        if change is Change.TENSORS:
            refuse_freed(self.source)
        self._freshness.take(change)  # first: what changes meanwhile is seen the next time
        self.twin.follow()
        if self._pattern and self._pattern.follow():
            self._copy_fast()
        for dtype, network in self._networks.items():
            network.follow(later=self._live and dtype != self.precision.dtype)
        if self._can_overflow():  # in others the exponent is never lowered
            self.state.follow()

    def _rebuild(self) -> None:
        """Copy the source anew, as the options ask for it on its present device."""
        refuse_unfit(self.source)
        self._freshness.take()
        if (device := device_of(self.source)) != self.state.device:
            self.state = state_on(device)
        self.state.start_anew()
        self.precision = resolve(self.source, device, self._dtype, self._channels_last)
        self.choice = Choice(self._dtype, self.precision.dtype, device, self._settled)
        self._settled = None  # of this structure
        self.precision = replace(self.precision, dtype=self.choice.dtype)
        self.kinds, self.notes = {}, []
        self.looked = self.writes = False
        self.twin = Twin(self.source, self.precision, live=self._live)
        self._pattern = pattern_of(self.source, self.twin, self.precision)
        self._trace: Trace | None = trace(self.source) if self.fuse_bn else None
        self._copy_fast()

    @property
    def fast(self) -> Engine:
        """What runs the fast network."""
        return self.network_in(self.precision.dtype).engine

    @property
    def folded(self) -> Folded:
        """The fast network."""
        return self.network_in(self.precision.dtype).folded

    def engine_for(self, kind: Kind) -> Engine:
        """What runs calls of this kind."""
        return self.network_in(kind.dtype).engine

    def network_in(self, dtype: torch.dtype) -> Fast:
        """The fast network in this precision, made when it is first asked for."""
        if (network := self._networks.get(dtype)) is None:  # read once: another thread may make them anew
            with self._lock, torch.inference_mode(False), torch.no_grad():  # no update meanwhile
                network = self._networks[dtype] = self._networks.get(dtype) or self._made(dtype)
                for kind in self.kinds.values():
                    self._let_end(kind)
        return network.caught_up(self._lock)

    def _made(self, dtype: torch.dtype) -> Fast:
        source = self._pattern.network if self._pattern else self.source
        gave_up = weakref.WeakMethod(self._gave_up)  # the engine is not to keep its owner alive

        def told(reason: str, runs: RunBy = "eager") -> None:
            if (tell := gave_up()) is not None:
                tell(reason, runs)

        precision = replace(self.precision, dtype=dtype)
        return Fast(source, self._trace, precision, self._engine, give_up=told, keeps=not self.writes)

    def _let_end(self, kind: Kind) -> None:
        if kind.rows.ends is not None and kind.dtype in self._networks:
            self._networks[kind.dtype].end_at(kind.rows.ends.layers)

    @property
    def followed(self) -> nn.Module:
        """A model with the weights of the last update: the source, or if that has changed since then, the pattern."""
        changed = not self._live and self._freshness.change() is not Change.NONE
        return self._pattern.network if self._pattern and changed else switched(self.source)

    @property
    def opaque(self) -> dict[str, str]:
        """Parts of the model whose forward does not trace, with the reason."""
        return self._trace.opaque if self._trace else {}

    def _copy_fast(self) -> None:
        self._networks: dict[torch.dtype, Fast] = {}
        self.network_in(self.precision.dtype)
        self.judges = Judges(self)

    def _gave_up(self, reason: str, runs: RunBy) -> None:
        """The engine asked for cannot run this network; with "auto" nothing was asked for, and a note is enough."""
        text = remarks.OTHER_ENGINE.format(runs, reason)
        if text not in self.notes:
            self.say(text, "" if self._engine == "auto" else "engine-eager")

    def twin_is_current(self) -> bool:
        """Whether the twin runs on the weights of the last update: its own, or the source's while they are the same."""
        return not self.twin.live or not self._freshness.wrote_parameters()

    def throw_away_copy(self, kind: Kind) -> EagerEngine:
        """What runs calls of this kind, once more, for looking into while it runs."""
        if kind.full:
            return Twin(self.followed, self.precision, live=False).engine
        precision = replace(self.precision, dtype=kind.dtype)
        folded = build_fast(self.followed, self._trace, precision)
        folded.end_at(kind.rows.ends.layers if precision.half and kind.rows.ends is not None else ())
        return EagerEngine(folded.network, precision, convert=True)

    def unfold(self, layers: Collection[str]) -> None:
        """Fold no more into these layers, which turned out to be called without their batch norm."""
        text = remarks.UNBALANCED.format(", ".join(layers))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self.unfinished = True
            self._trace = self._trace and self._trace.without_layers(layers)
            self.generation += 1
            self._copy_fast()
            self.unfinished = False
        self.say(text, "not-folded")

    def marks(self) -> tuple[Any, ...]:
        """Equal as long as the gradient at an input is made in the same way; waits for the device in float16."""
        dtypes = [kind.dtype for kind in tuple(self.kinds.values())]
        return self.generation, self.updates, dtypes, int(self.state.exponent) if self._can_overflow() else None

    def look_once(self, arguments: Packed, needs: Sequence[bool]) -> None:
        """Before anything is run: how large are its products, and does it write into the twin's parameters?"""
        with self._lock:
            if self.looked:
                return
            asked = (few(arguments.tensors, needs), arguments.tensors)  # it may take batches of one size only
            seen = (writes_parameters(self.followed, self.precision, arguments, t, self.choice.counting) for t in asked)
            writes = next((found for found in seen if found is not None), None)
            if writes and not self.writes:
                self.unfinished = self.writes = True
                if self.twin.live:
                    self.twin = Twin(self.source, self.precision, live=False)
                    self.notes.append(remarks.WRITES)
                self.generation += 1
                self._copy_fast()  # what was laid out would not follow
                self.unfinished = False
            self.looked = writes is not None and number_of_samples(arguments.tensors) > 0

    def kind(self, key: Any) -> Kind:
        """What is known of the kind of call with this key."""
        return self.kinds.get(key) or Kind(self.precision.dtype)

    def _check_few(self, key: Any, arguments: Packed, needs: Sequence[bool]) -> None:
        """At the first call of each kind, and again when there are two samples at last: is the fast run right?"""
        samples = number_of_samples(arguments.tensors)
        if samples == 0 or self._is_known(key, samples):
            return
        with self._lock, trying(self.precision.device):
            if self._is_known(key, samples):
                return
            if not self.choice.knows(arguments.tensors):  # what was run before had other shapes, and no gradient
                self.looked = False
                self.look_once(arguments, needs)
            if not self.choice.settle(samples):
                self._run_in_full()
            verdict = check(self.followed, self._trace, self.precision, arguments, needs, self.source)
            if verdict.refused is not None:
                self.twin.try_out(arguments)
            said = self._adopt(verdict)
            self._let_end(remember(self.kinds, key, verdict.kind(self.precision.dtype, settled=samples > 1)))
        for text, anchor in said:  # last, since a warning may be an error
            self.say(text, anchor)

    def _run_in_full(self) -> None:
        """Half precision does not pay."""
        self.unfinished, self.precision = True, replace(self.precision, dtype=torch.float32)
        self.generation += 1
        self._copy_fast()
        self.unfinished = False

    def _is_known(self, key: Any, samples: int) -> bool:
        known = self.kinds.get(key)
        return known is not None and (known.settled or samples < 2)

    def _adopt(self, verdict: Verdict) -> list[tuple[str, str]]:
        """Run from now on as the check has found to be right; returns what to say of it, with its place in the docs."""
        self.unfinished = True
        said = verdict.said()
        differs = verdict.exponent < START and self.fast.name != "eager"  # the check is eager: others round otherwise
        self.state.start_at_most(verdict.exponent - STEP * differs)
        if verdict.layout_error is not None:
            self.precision = replace(self.precision, channels_last=False)
        if verdict.half_error is not None:
            self.precision = replace(self.precision, dtype=verdict.instead)
            self.choice.why = ""  # a note says it
        if verdict.unexplained:
            self.twin.thaw()
        said = [(text, anchor) for text, anchor in said if text not in self.notes]
        self.notes += [text for text, _ in said]
        if verdict.plan is not self._trace or verdict.layout_error is not None or verdict.half_error is not None:
            self._trace = verdict.plan
            self.generation += 1
            self._copy_fast()
        self.unfinished = False
        new = [(text, anchor) for text, anchor in said if anchor and text not in self._said]
        self._said.update(text for text, _ in new)
        return new
