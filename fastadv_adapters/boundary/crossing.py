"""What happens to tensors where they leave the network and where gradients come back: all of it on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..modules import gradients_of
from .ends import Cuts, Ends
from .on_device import DeviceState
from .on_host import HostState
from .scaling import LossScale, Shift, scale

Pairs = list[tuple[Tensor, Tensor]]
"""Tensors with their graph, and the gradients that come in at them."""


State = HostState | DeviceState
"""What the boundary of one model remembers: one class for processors, one for accelerators, with the same methods."""


class Pulled(NamedTuple):
    """What a backward pass gave.

    Attributes:
        gradients: one for each input that requires one, float32 or float64, finite.
        spoilt: which samples lost entries, bool (N,); None if the gradients are empty.
    """

    gradients: list[Tensor]
    spoilt: Tensor | None


@dataclass(frozen=True)
class Rows:
    """What one kind of call is known to do with samples, and where half precision ends in it.

    Attributes:
        ends: the last matrix layers; None if half precision reaches the outputs.
        at_ends: whether what these give has a row per sample, whose gradient reaches that sample alone.
        at_outputs: likewise, for each output; empty if it could not be found out.
        higher: by how much, as a power of two, gradients that are scaled together may be scaled higher than others.
        float16: whether the model's own code runs a part of it in float16, whatever the network runs in.
    """

    ends: Ends | None = None
    at_ends: bool = True
    at_outputs: tuple[bool, ...] | None = None
    higher: int = 0
    float16: bool = False

    @property
    def all_apart(self) -> bool:
        """Whether each sample has a scale of its own, wherever gradients come in."""
        if self.ends is not None and self.ends.cut:
            return self.at_ends
        return self.at_outputs is None or (self.at_outputs != () and all(self.at_outputs))

    def apart(self, given: Sequence[bool]) -> bool:
        """Whether gradients that come in at these outputs may be scaled there sample by sample."""
        known = self.at_outputs
        if not known:
            return known is None
        return all(row for row, come_in in zip(known, given, strict=False) if come_in)


@dataclass(frozen=True)
class Crossing:
    """The two ways across the boundary of one model, as engines run (or record) them together with the network.

    Attributes:
        logits_dtype: dtype of floating outputs.
        loss_scale: how gradients are scaled.
        can_overflow: whether the network, or a part of it, runs in float16.
        state: the model's memory between passes.
        rows: what is known of this kind of call.
        counts_outputs: whether outputs are looked at: not where others are handed out in their place.
    """

    logits_dtype: torch.dtype
    loss_scale: LossScale
    can_overflow: bool
    state: State
    rows: Rows = Rows()
    counts_outputs: bool = True

    def leave(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs as they are handed out: detached, floating ones in the logits dtype; counts those not finite."""
        own = [o if o.requires_grad or memory_of(o) not in _rewritten else o.clone() for o in outputs]
        left = [o.detach().to(self.logits_dtype) if o.is_floating_point() else o.detach() for o in own]
        if self.counts_outputs:
            self.state.count_logits(left)
        return left

    def pull(
        self,
        outputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        *,
        keep: bool,
        cuts: Cuts | None = None,
    ) -> Pulled:
        """One backward pass from the gradients at the outputs: scaled, unscaled, filtered, counted.

        Args:
            outputs: of the network, with their graph.
            leaves: the inputs of that graph.
            grads: one per output; None, or for an output without a graph, is passed over.
            keep: whether the graph is needed again.
            cuts: where the graph is in two parts. The gradient passes the upper part as it is, in full precision.
        """
        given = [g is not None and o.requires_grad for o, g in zip(outputs, grads, strict=True)]
        pairs = [(o, g) for o, g, come_in in zip(outputs, grads, given, strict=True) if g is not None and come_in]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        shift: Shift | None = None
        past: Sequence[Tensor | None] = ()
        if cuts is not None and cuts.above:
            # What comes in may lie below the range even of the upper part.
            if not isinstance(self.loss_scale, (int, float)):  # a number is for half precision alone
                pairs, shift, _ = self._scaled(pairs, wanted, apart=self.rows.apart(given))
            pairs, past = _above(pairs, cuts, wanted)
            if shift is not None:
                past = [g if g is None else (-shift).times(g) for g in past]
            pairs, own, loss_scale = self._scaled(pairs, wanted, apart=self.rows.at_ends)
            shift = own if shift is None or own is None else own + shift
        else:
            pairs, shift, loss_scale = self._scaled(pairs, wanted, apart=self.rows.apart(given))
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            found = _below(pairs, wanted, cuts, keep=keep)
        raw = [leaf.new_zeros(leaf.shape) if g is None else g for g, leaf in zip(found, wanted, strict=True)]
        entered = [t for pair in pairs for t in pair] if self._is_narrow(wanted) else None
        return Pulled(*self.state.finish(loss_scale, raw, shift, past, entered))

    def _is_narrow(self, wanted: Sequence[Tensor]) -> bool:
        """Whether gradients pass float16 on the way, or at the inputs themselves."""
        return self.can_overflow or any(leaf.dtype == torch.float16 for leaf in wanted)

    def _scaled(self, pairs: Pairs, wanted: Sequence[Tensor], *, apart: bool) -> tuple[Pairs, Shift | None, LossScale]:
        """Gradients scaled for a way through the graph; by which powers of two, and how that was done."""
        together = self.loss_scale == "per-sample" and not apart
        loss_scale: LossScale = "per-call" if together else self.loss_scale
        higher = self.rows.higher if together else 0
        grads = [g for _, g in pairs]
        wide = not self._is_narrow(wanted)
        shift = self.state.shift_for(loss_scale, grads, wanted, higher=higher, wide=wide)
        return [(o, scale(g, shift, loss_scale)) for o, g in pairs], shift, loss_scale


def _below(pairs: Pairs, wanted: Sequence[Tensor], cuts: Cuts | None, *, keep: bool) -> Sequence[Tensor | None]:
    """The backward pass of the network, or of what is below the last matrix layers.

    If there are several of these, some may follow others, though they did not in the run that told of them.
    """
    above = cuts.above if cuts is not None and len(cuts.above) > 1 else []
    total: list[Tensor | None] = [None] * len(wanted)
    while pairs:
        tips, scaled = [o for o, _ in pairs], [g.to(o.dtype) for o, g in pairs]
        retain = keep or bool(above)
        found = gradients_of(tips, [*wanted, *above], scaled, retain_graph=retain)
        new = found[: len(wanted)]
        total = [a if b is None else b if a is None else a + b for a, b in zip(total, new, strict=True)]
        at_cuts = zip(cuts.below if cuts is not None else (), found[len(wanted) :], strict=False)
        pairs = [(o, g) for o, g in at_cuts if g is not None]
    return total


_rewritten: WeakValueDictionary[int | None, Tensor] = WeakValueDictionary()
"""Tensors that updates write into, by the place of their memory: what is detached of them shares nothing else."""


def mark_rewritten(tensor: Tensor) -> None:
    """Say of a tensor that updates write into it: what shares its memory is handed out as a copy."""
    _rewritten[memory_of(tensor)] = tensor


def memory_of(tensor: Tensor) -> int | None:
    """Where its storage lies; None for a layout that has none."""
    with torch._C.DisableTorchFunction():  # a mode takes this for a way to write without a trace
        return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else None


def _above(pairs: Pairs, cuts: Cuts, wanted: Sequence[Tensor]) -> tuple[Pairs, Sequence[Tensor | None]]:
    """The backward pass of what follows the last matrix layers.

    Returns:
        What those layers gave, with the gradients there; and the gradients that reach inputs past all of them.
    """
    found: Sequence[Tensor | None] = [None] * (len(cuts.above) + len(wanted))
    if pairs:
        outputs, grads = [o for o, _ in pairs], [g.to(o.dtype) for o, g in pairs]
        # Kept, for a layer that the self-check has not met may have a way of its own into what is below.
        found = gradients_of(outputs, [*cuts.above, *wanted], grads, retain_graph=True)
    at_cuts = found[: len(cuts.above)]
    return [(o, g) for o, g in zip(cuts.below, at_cuts, strict=True) if g is not None], found[len(cuts.above) :]
