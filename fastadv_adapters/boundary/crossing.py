"""What happens to tensors where they leave the network and where gradients come back: all of it on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .scaling import LossScale, State, row_peaks, scale, shift_for, unscale_and_filter


class Pulled(NamedTuple):
    """What a backward pass gave.

    Attributes:
        gradients: one for each input that requires one, float32 or float64, finite.
        broken: which samples lost entries, bool (N,); None if the gradients are empty.
    """

    gradients: list[Tensor]
    broken: Tensor | None


@dataclass(frozen=True)
class Crossing:
    """The two ways across the boundary of one model, as engines run (or record) them together with the network.

    Attributes:
        logits_dtype: dtype of floating outputs.
        loss_scale: how gradients are scaled.
        can_overflow: whether the network runs in float16.
        state: the model's memory between passes.
        counts_outputs: whether outputs are looked at: not where others are handed out in their place.
    """

    logits_dtype: torch.dtype
    loss_scale: LossScale
    can_overflow: bool
    state: State
    counts_outputs: bool = True

    def leave(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs as they are handed out: detached, floating ones in the logits dtype; counts those not finite."""
        left = [o.detach().to(self.logits_dtype) if o.is_floating_point() else o.detach() for o in outputs]
        if self.counts_outputs:
            self.state.count_logits(left)
        return left

    def pull(
        self, outputs: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor | None], *, keep: bool
    ) -> Pulled:
        """One backward pass from the gradients at the outputs: scaled, unscaled, filtered, counted.

        Args:
            outputs: of the network, with their graph.
            leaves: the inputs of that graph.
            grads: one per output; None, or for an output without a graph, is passed over.
            keep: whether the graph is needed again.
        """
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        shift = shift_for(self.loss_scale, self.state, [g for _, g in pairs], wanted)
        scaled = [scale(g, shift, self.loss_scale).to(o.dtype) for o, g in pairs]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            found = torch.autograd.grad([o for o, _ in pairs], wanted, scaled, retain_graph=keep, allow_unused=True)
        raw = [leaf.new_zeros(leaf.shape) if g is None else g for g, leaf in zip(found, wanted, strict=True)]
        clean, broken = unscale_and_filter(self.loss_scale, self.state, raw, shift)
        if broken is not None and self.can_overflow:
            self.state.lower_after(broken & _entered_finite(pairs, broken))
        return Pulled(clean, broken)


def _entered_finite(pairs: Sequence[tuple[Tensor, Tensor]], broken: Tensor) -> Tensor:
    """Which samples have finite outputs and came with a finite gradient: the others cannot tell of an overflow."""
    peaks = row_peaks([t.detach().float() for pair in pairs for t in pair])
    return broken if peaks is None or peaks.shape != broken.shape else peaks.isfinite()
