"""The two networks behind a fast model: the full-precision twin and the fast network, kept up to date in place."""

import threading
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .copying import alias, clone, copy_module
from .engines import EagerEngine
from .folding import Folded, build
from .freshness import Change, Freshness
from .notices import notify
from .packing import Packed
from .precision import Precision
from .scaling import State
from .selfcheck import Verdict, check
from .tracing import Trace, trace

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
_UNBALANCED = "batch norm is not folded into {}, which the model also calls without that batch norm"
_COUPLED = (
    "the gradient of one sample reaches other samples (batch norm without running statistics, or features centred "
    "over the batch): one loss scale serves the whole call instead of one per sample"
)


class Networks:
    """Twin and fast network of one wrapped model.

    Args:
        source: the wrapped model; never touched.
        precision: how the fast network computes.
        fuse_bn: whether batch norms are folded or frozen.

    Attributes:
        twin: runs the wrapped model's own weights, in its own precision, in eval mode.
        fast: runs the fast network.
        updates: how often the source was followed.
        generation: counts changes of the fast network; a backward pass belongs to the generation of its forward pass.
        samples_apart: whether no sample's gradient reaches another's, as far as was checked.
        notes: what was done otherwise than asked, for the summary.
    """

    def __init__(self, source: nn.Module, precision: Precision, *, fuse_bn: bool) -> None:
        self.source = source
        self.precision = precision
        self.fuse_bn = fuse_bn
        self.state = State(precision.device)
        self.generation = 0
        self.updates = 0
        self.notes: list[str] = []
        self._lock = threading.RLock()
        self._freshness = Freshness(source)
        self._rebuild()

    def refresh(self, *, unasked: bool = False) -> None:
        """Bring everything up to date with the source; ``unasked`` only if a change is noticed."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            change = self._freshness.change()
            if unasked and change is Change.NONE:
                return
            self.generation += 1
            self.updates += 1
            if change is Change.STRUCTURE:
                self._rebuild()
            else:
                self._follow_twin()
                for refresh in self.folded.refreshes:
                    refresh()
                self.state.reset_exponent()
                self._freshness.take_values()

    def _rebuild(self) -> None:
        """Copy the source anew."""
        device = device_of(self.source)
        if device != self.precision.device:
            self.precision = replace(self.precision, device=device)
            self.state = State(device)
        self.state.reset_exponent()
        self.checked_samples = 0
        self.samples_apart = True
        self.notes = []
        self._copy_twin()
        self._trace: Trace | None = trace(self.source) if self.fuse_bn else None
        self._copy_fast()
        self._freshness.take()

    @property
    def opaque(self) -> dict[str, str]:
        """Parts of the model whose forward does not trace, with the reason."""
        return self._trace.opaque if self._trace else {}

    def _copy_twin(self) -> None:
        twin = copy_module(self.source, alias)
        self._twin_parts = list(zip(self.source.modules(), twin.modules(), strict=True))
        for part in twin.modules():  # own buffers: a forward may write into them
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else clone(buffer)
        self.twin = EagerEngine(twin, replace(self.precision, dtype=torch.float32), convert=False)

    def _copy_fast(self) -> None:
        self.folded: Folded = build(self.source, self._trace, self.precision)
        around = self.folded.balanced if self.folded.balances else nullcontext
        self.fast = EagerEngine(self.folded.network, self.precision, convert=True, around=around)

    def unfold(self, layers: Collection[str]) -> None:
        """Fold no more into these layers, which turned out to be called without their batch norm."""
        text = _UNBALANCED.format(", ".join(layers))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._trace = self._trace and self._trace.without_layers(layers)
            self.generation += 1
            self._copy_fast()
            self.notes.append(text)
        notify(f"FastAttackModel of {type(self.source).__name__}: {text}", "not-folded")

    def _follow_twin(self) -> None:
        """Alias again what was replaced or moved in the source; copy its buffers."""
        for theirs, ours in self._twin_parts:
            _alias_again(theirs._parameters, ours._parameters)
            _alias_again(vars(theirs), vars(ours))
            for name, buffer in theirs._buffers.items():
                copied = ours._buffers[name]
                if buffer is not None and copied is not None:
                    copied.copy_(buffer)

    def check_once(self, arguments: Packed) -> None:
        """At the first gradient forward, and again when there are two samples at last: is the fast run right?"""
        samples = len(arguments.tensors[0])
        if self.checked_samples >= min(samples, 2):
            return
        with self._lock:
            remarks = self._adopt(check(self.source, self._trace, self.precision, arguments))
            self.checked_samples = min(samples, 2)
        for text, anchor in remarks:  # last, since a warning may be an error
            notify(f"FastAttackModel of {type(self.source).__name__}: {text}", anchor)

    def _adopt(self, verdict: Verdict) -> list[tuple[str, str]]:
        """Run from now on as the check has found to be right; returns what to say of it, with its place in the docs."""
        remarks = []
        if verdict.layout_error is not None:
            self.precision = replace(self.precision, channels_last=False)
            remarks.append((_NOT_CHANNELS_LAST.format(verdict.layout_error), "not-channels-last"))
        if verdict.half_error is not None:
            remarks.append((_NOT_HALF.format(self.precision.dtype, verdict.half_error), "not-half"))
            self.precision = replace(self.precision, dtype=torch.float32)
        if verdict.folding_error is not None:
            text = _DIFFERS if verdict.unexplained else _NOT_FOLDED
            left = len(verdict.plan.producer) if verdict.plan else 0
            remarks.append((text.format(verdict.folding_error, left), "not-folded"))
        self.notes += [text for text, _ in remarks]
        if verdict.harmless:
            remarks.pop()
        if verdict.folding_error or remarks:
            self._trace = verdict.plan
            self.generation += 1
            self._copy_fast()
        if verdict.samples_coupled:
            self.samples_apart = False
            self.notes.append(_COUPLED)
            remarks.append((_COUPLED, "samples-coupled"))
        return remarks


def _alias_again(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, tensor in theirs.items():
        if isinstance(tensor, Tensor):
            own = ours[name]
            if tensor.data_ptr() != own.data_ptr() or tensor.shape != own.shape:
                ours[name] = alias(tensor)


def device_of(module: nn.Module) -> torch.device:
    """The one device of a module's parameters and buffers.

    Raises:
        ValueError: they are on several devices.
    """
    devices = {t.device for t in (*module.parameters(), *module.buffers())}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "none at all"
        raise ValueError(
            f"expected all parameters and buffers of the model on one device, got {found}. Move the model with .to()"
        )
    return devices.pop()
