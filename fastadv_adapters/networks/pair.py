"""The two networks behind a fast model: the full-precision twin and the fast network, kept up to date in place."""

import threading
import weakref
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ..boundary import Packed, State, outside_of_transforms
from ..engines import make_engine
from ..folding import Folded, Trace, build_fast, trace
from ..modules import Anchor, EngineName, notify, number_of_samples, refuse_unfit, resolve
from .freshness import Change, Freshness
from .selfcheck import Verdict, check, few
from .twin import Twin, writes_parameters

_NOT_CHANNELS_LAST = (
    "the model runs in the contiguous layout, since channels-last it raised {} (flatten(1) or reshape() in place of "
    "view() would let it run faster)"
)
_NOT_HALF = "the model runs in float32, since in {} it raised {}"
_NOT_FOLDED = "batch norm is folded into {1} layers only, since {0}"
_DIFFERS = (
    "the fast network differs from the wrapped model even where nothing is folded: {} (is the model random in a way "
    'that no seed of PyTorch, Python or NumPy controls?); view(full_precision=True) and decisions="exact" are right'
)
_WRITES = "the model writes into its own parameters when it is run: the twin has copies of them instead of aliases"
_EAGER = "the engine is eager, since {}"
_UNBALANCED = "batch norm is not folded into {}, which the model also calls without that batch norm"
_building = threading.RLock()
_COUPLED = (
    "the gradient of one sample reaches other samples (batch norm without running statistics, or features centred "
    "over the batch): one loss scale serves the whole call instead of one per sample"
)


class Networks:
    """Twin and fast network of one wrapped model.

    Args:
        source: the wrapped model; never touched.
        dtype: what the fast network is asked to compute in.
        channels_last: the layout asked for.
        fuse_bn: whether batch norms are folded or frozen.
        live: whether the twin runs the source's own parameters, or as they were at the last update.
        engine: the engine asked for.

    Attributes:
        precision: how the fast network computes, after all that had to be done otherwise than asked.
        twin: runs the wrapped model's own weights, in its own precision, in eval mode.
        fast: runs the fast network.
        updates: how often the source was followed.
        generation: counts changes of the fast network; a backward pass belongs to the generation of its forward pass.
        unfinished: whether an update was interrupted; nothing may run before the next one.
        samples_apart: whether no sample's gradient reaches another's, as far as was checked.
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
    ) -> None:
        self.source = source
        self._dtype: torch.dtype | Literal["auto"] = dtype
        self._channels_last: bool | Literal["auto"] = channels_last
        self.fuse_bn = fuse_bn
        self._live = live
        self._engine = engine
        self.state = State(device_of(source))
        self.generation = 0
        self.updates = 0
        self.unfinished = False
        self._lock = threading.RLock()
        self._freshness = Freshness(source)
        with torch.no_grad():
            self._rebuild()

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("_dtype", "_channels_last", "fuse_bn", "_live", "_engine")
        return _blank, (), (self.source, {name.strip("_"): getattr(self, name) for name in names})

    def __setstate__(self, state: tuple[nn.Module, dict[str, Any]]) -> None:
        vars(self).update(zip(("source", "_unbuilt"), state, strict=True))

    def __getattr__(self, name: str) -> Any:
        """Build copied or unpickled networks at the first use: before, their copy of the source may not be whole."""
        with _building, torch.inference_mode(False):
            if "_unbuilt" in vars(self):
                state = dict(vars(self))
                try:
                    Networks.__init__(self, self.source, **vars(self).pop("_unbuilt"))
                except BaseException:
                    vars(self).clear()
                    vars(self).update(state)
                    raise
            if name in vars(self):
                return vars(self)[name]
        return super().__getattribute__(name)

    def refresh(self, *, unasked: bool = False) -> None:
        """Bring everything up to date with the source; ``unasked`` only if a change is noticed.

        An update that was interrupted is made good by a new build before anything is run again.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            change = Change.STRUCTURE if self.unfinished else self._freshness.change()
            if unasked and change is Change.NONE:
                return
            self.unfinished = True
            self.generation += 1
            self.updates += 1
            with outside_of_transforms():
                self._follow(change)
            self.unfinished = False

    def _follow(self, change: Change) -> None:
        if change is Change.STRUCTURE:
            self._rebuild()
            return
        self._freshness.take(change)  # first: what changes meanwhile is seen the next time
        self.twin.follow()
        for refresh in self.folded.refreshes:
            refresh()
        self.fast.follow()
        if self.precision.dtype == torch.float16:  # in others the exponent is never lowered
            self.state.follow()

    def _rebuild(self) -> None:
        """Copy the source anew, as the options ask for it on its present device."""
        refuse_unfit(self.source)
        self._freshness.take()
        device = device_of(self.source)
        if device != self.state.device:
            self.state = State(device)
        self.state.start_anew()
        self.precision = resolve(self.source, device, self._dtype, self._channels_last)
        self._checked: set[Any] = set()
        self._looked = False
        self.samples_apart = True
        self.notes: list[str] = []
        self.twin = Twin(self.source, self.precision, live=self._live)
        self._trace: Trace | None = trace(self.source) if self.fuse_bn else None
        self._copy_fast()

    @property
    def checked(self) -> bool:
        """Whether the self-check has been made."""
        return bool(self._checked)

    @property
    def opaque(self) -> dict[str, str]:
        """Parts of the model whose forward does not trace, with the reason."""
        return self._trace.opaque if self._trace else {}

    def _copy_fast(self) -> None:
        # Without live following everything is of the last update, which the twin holds: it stands for the source.
        source = self.source if self._live else self.twin.engine.network
        packs = self._engine != "compile"
        self.folded: Folded = build_fast(source, self._trace, self.precision, lays_out_ahead=packs)
        gave_up = weakref.WeakMethod(self._gave_up)  # the engine is not to keep its owner alive
        self.fast = make_engine(
            self._engine,
            self.folded.network,
            self.precision,
            around=self.folded.balanced,
            give_up=lambda reason: (gave_up() or _ignore)(reason),
        )

    def _gave_up(self, reason: str) -> None:
        """The engine asked for cannot run this network; with "auto" nothing was asked for, and a note is enough."""
        text = _EAGER.format(reason)
        if text not in self.notes:
            self.notes.append(text)
            if self._engine != "auto":
                notify(f"FastAttackModel of {type(self.source).__name__}: {text}", "engine-eager")

    def twin_is_current(self) -> bool:
        """Whether the twin runs on the weights of the last update: its own, or the source's while they are the same."""
        return not self.twin.live or self._freshness.change() is Change.NONE

    def throw_away_copy(self) -> nn.Module:
        """Another fast network like the one in use, for looking into while it runs."""
        return build_fast(self.source, self._trace, self.precision).network

    def unfold(self, layers: Collection[str]) -> None:
        """Fold no more into these layers, which turned out to be called without their batch norm."""
        text = _UNBALANCED.format(", ".join(layers))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self.unfinished = True
            self._trace = self._trace and self._trace.without_layers(layers)
            self.generation += 1
            self._copy_fast()
            self.notes.append(text)
            self.unfinished = False
        notify(f"FastAttackModel of {type(self.source).__name__}: {text}", "not-folded")

    def look_once(self, arguments: Packed) -> None:
        """Before anything is run: does the model write into its parameters? The twin's are then its own."""
        with self._lock:
            if self._looked or not self._live:
                return
            writes = None
            for tensors in (few(arguments.tensors), arguments.tensors):  # it may take batches of one size only
                writes = writes_parameters(self.source, self.precision, arguments, tensors)
                if writes is not None:
                    break
            if writes:
                self.unfinished = True
                self.twin = Twin(self.source, self.precision, live=False)
                self.notes.append(_WRITES)
                self.unfinished = False
            self._looked = writes is not None and number_of_samples(arguments.tensors) > 0

    def check_once(self, arguments: Packed) -> None:
        """At the first call of each kind, and again when there are two samples at last: is the fast run right?"""
        samples = number_of_samples(arguments.tensors)
        kind = (arguments.kind, min(samples, 2))
        if samples == 0 or kind in self._checked or (kind[0], 2) in self._checked:
            return
        with self._lock:
            if kind in self._checked or (kind[0], 2) in self._checked:
                return
            verdict = check(self.source, self._trace, self.precision, arguments)
            if verdict is None:
                return
            remarks = self._adopt(verdict)
            self._checked.add(kind)
        for text, anchor in remarks:  # last, since a warning may be an error
            notify(f"FastAttackModel of {type(self.source).__name__}: {text}", anchor)

    def _adopt(self, verdict: Verdict) -> list[tuple[str, str]]:
        """Run from now on as the check has found to be right; returns what to say of it, with its place in the docs."""
        self.unfinished = True
        remarks = []
        self.state.start_at_most(verdict.exponent)
        if verdict.layout_error is not None:
            self.precision = replace(self.precision, channels_last=False)
            remarks.append((_NOT_CHANNELS_LAST.format(verdict.layout_error), "not-channels-last"))
        if verdict.half_error is not None:
            remarks.append((_NOT_HALF.format(self.precision.dtype, verdict.half_error), "not-half"))
            self.precision = replace(self.precision, dtype=torch.float32)
        if verdict.folding_error is not None:
            text = _DIFFERS if verdict.unexplained else _NOT_FOLDED
            left = len(verdict.plan.producer) if verdict.plan else 0
            text = text.format(verdict.folding_error, left)
            if verdict.harmless:
                self.notes.append(text)
            else:
                remarks.append((text, "not-folded"))
        self.notes += [text for text, _ in remarks]
        if verdict.folding_error or remarks:
            self._trace = verdict.plan
            self.generation += 1
            self._copy_fast()
        self.samples_apart = self.samples_apart and verdict.batch_first and not verdict.samples_coupled
        if verdict.samples_coupled and _COUPLED not in self.notes:
            self.notes.append(_COUPLED)
            remarks.append((_COUPLED, "samples-coupled"))
        self.unfinished = False
        return remarks


def _blank() -> Networks:
    """What becomes deep-copied or unpickled networks around their own copy of the source; views share them."""
    return Networks.__new__(Networks)


def _ignore(reason: str) -> None:
    pass


def device_of(module: nn.Module) -> torch.device:
    """The one device of a module's parameters and buffers.

    Raises:
        ValueError: they are on several devices.
    """
    tensors = (*module.parameters(), *module.buffers())
    devices = {t.device for t in tensors if not isinstance(t, Anchor)}  # that of a fast model of its own follows later
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "none at all"
        raise ValueError(
            f"expected all parameters and buffers of the model on one device, got {found}. Move the model with .to()"
        )
    return devices.pop()
