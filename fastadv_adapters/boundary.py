"""The boundary: the whole fast run as one node of the caller's graph, so that every gradient passes through here.

One autograd Function holds all inputs and outputs. (A pair of nodes, one before and one after the network, with state
passed between them on the side, would be silently wrong with ``retain_graph`` and for second derivatives.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .engines import Run
from .packing import Packed
from .scaling import LossScale, State, current_watches, row_peaks, scale, shift_for, unscale_and_filter


@dataclass
class Call:
    """One call of the fast model, as the boundary sees it.

    Attributes:
        fast: the fast run.
        twin: the full-precision run.
        exact_values: whether the values handed out are the twin's.
        logits_dtype: dtype of floating outputs.
        loss_scale: how gradients are scaled.
        state: the model's memory between passes.
        can_overflow: whether the fast run is in float16.
        is_current: whether the weights are still those of the forward pass.
    """

    fast: Run
    twin: Run
    exact_values: bool
    logits_dtype: torch.dtype
    loss_scale: LossScale
    state: State
    can_overflow: bool
    is_current: Callable[[], bool]
    output: Packed | None = None

    def __post_init__(self) -> None:
        self.watches = current_watches()

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """Run with gradients through the boundary; returns the model's output."""
        outputs = Boundary.apply(self, *tensors)  # type: ignore[no-untyped-call]
        if self.output is None:
            raise RuntimeError("expected the boundary to leave the structure of the output, got none")
        return self.output.rebuild(outputs)

    def values(self, tensors: Sequence[Tensor], *, exact: bool) -> Any:
        """The model's output without gradients, from the twin or from the fast run."""
        output = _with_tensors((self.twin if exact else self.fast)(tensors))
        handed_out = self.leave(output.tensors)
        self.state.count_logits(handed_out)
        return output.rebuild(handed_out)

    def leave(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs as they are handed out: detached, floating ones in the logits dtype."""
        return [o.detach().to(self.logits_dtype) if o.is_floating_point() else o.detach() for o in outputs]


def _with_tensors(output: Packed) -> Packed:
    if not output.tensors:
        raise TypeError(
            "expected an output of tensors, in tuples, lists, dicts or classes known to PyTorch, got one in which no "
            "tensor is seen: return one of these, or register the class with torch.utils._pytree"
        )
    return output


def _entered_finite(pairs: Sequence[tuple[Tensor, Tensor]], broken: Tensor) -> Tensor:
    """Which samples have finite outputs and came with a finite gradient: the others cannot tell of an overflow."""
    peaks = row_peaks([t.detach().float() for pair in pairs for t in pair])
    return broken if peaks is None or peaks.shape != broken.shape else peaks.isfinite()


class _Tape(NamedTuple):
    leaves: list[Tensor]
    outputs: list[Tensor]


class Boundary(torch.autograd.Function):
    """The whole fast run as one node of the caller's graph."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the network on its own graph, which stays inside this node."""
        needs = list(ctx.needs_input_grad[1:])
        tape = _record(call, tensors, needs)
        values = tape.outputs
        if call.exact_values:
            with torch.no_grad():
                values = call.twin([t.detach() for t in tensors]).tensors
        ctx.call, ctx.tape, ctx.needs = call, tape, needs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        handed_out = tuple(call.leave(values))
        call.state.count_logits(handed_out)
        ctx.mark_non_differentiable(*(h for h, o in zip(handed_out, tape.outputs, strict=True) if not o.requires_grad))
        return handed_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scale, run the network's backward pass, unscale, filter, count."""
        call: Call = ctx.call
        needs: list[bool] = ctx.needs
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        if not call.is_current():
            raise RuntimeError(
                "expected a backward pass with the weights of its forward pass, but the fast model was updated in "
                "between (by update(), or by a forward pass after the wrapped model had changed). Run the forward "
                "pass again, or call backward() before the weights change"
            )
        # An autocast region around backward() would lower the products of a network in full precision.
        with torch.autocast(tensors[0].device.type, enabled=False):
            if torch.is_grad_enabled() or any(g is not None and _is_batched(g) for g in grads):
                return None, *_differentiable(call, tensors, needs, grads)
            tape: _Tape = ctx.tape or _record(call, tensors, needs)
            keep = _graph_is_kept()
            ctx.tape = tape if keep else None
            return None, *_scaled_backward(call, tape, tensors, grads, keep=keep)


def _record(call: Call, tensors: Sequence[Tensor], needs: list[bool]) -> _Tape:
    """Run the fast network with a graph of its own."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        call.output = _with_tensors(call.fast(leaves))
    return _Tape(leaves, call.output.tensors)


def _graph_is_kept() -> bool:
    """Whether the caller asked for ``retain_graph``; where PyTorch does not tell, a later pass recomputes."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(kept()) if kept else False


def _is_batched(grad: Tensor) -> bool:
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad))


def _differentiable(
    call: Call, tensors: Sequence[Tensor], needs: list[bool], grads: Sequence[Tensor | None]
) -> Iterator[Tensor | None]:
    """The gradient from the full-precision twin, itself differentiable: for second order and batched gradients."""
    with torch.enable_grad():
        # Inputs that depend on each other must not reach each other's gradient through their own history.
        tensors = [t.view_as(t) if need else t for t, need in zip(tensors, needs, strict=True)]
        outputs = call.twin(tensors).tensors
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        if pairs
        else [None] * len(wanted)
    )
    for need in needs:
        grad = next(found) if need else None
        yield grad if grad is None else torch.where(grad.isfinite(), grad, 0.0)


def _scaled_backward(
    call: Call, tape: _Tape, tensors: Sequence[Tensor], grads: Sequence[Tensor | None], *, keep: bool
) -> list[Tensor | None]:
    """One backward pass of the fast network under the call's loss scale."""
    pairs = [(o, g) for o, g in zip(tape.outputs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [leaf for leaf in tape.leaves if leaf.requires_grad]
    shift = shift_for(call.loss_scale, call.state, [g for _, g in pairs], wanted)
    scaled = [scale(g, shift, call.loss_scale).to(o.dtype) for o, g in pairs]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs:
        found = torch.autograd.grad([o for o, _ in pairs], wanted, scaled, retain_graph=keep, allow_unused=True)
    raw = [leaf.new_zeros(leaf.shape) if g is None else g for g, leaf in zip(found, wanted, strict=True)]
    clean, broken = unscale_and_filter(call.loss_scale, call.state, raw, shift)
    if broken is not None:
        if call.can_overflow:
            call.state.lower_after(broken & _entered_finite(pairs, broken))
        for watch in call.watches:
            watch.add(broken)
    results = iter(clean)
    return [
        next(results).to(t.dtype) if leaf.requires_grad else None for t, leaf in zip(tensors, tape.leaves, strict=True)
    ]
