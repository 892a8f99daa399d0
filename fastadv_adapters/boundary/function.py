"""The boundary: the whole fast run as one node of the caller's graph, so that every gradient passes through here.

One autograd Function holds all inputs and outputs. (A pair of nodes, one before and one after the network, with state
passed between them on the side, would be silently wrong with ``retain_graph`` and for second derivatives.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..modules import autocast, without_anomaly_mode, without_reentrant_checkpoints
from .crossing import Crossing, Pulled
from .packing import Packed
from .run import Run, Tape
from .watching import WATCHES

Audit = Callable[[Sequence[Tensor], Sequence[bool], Sequence[Tensor | None], Pulled, Sequence[Tensor] | None], Pulled]


@dataclass
class Call:
    """One call of the fast model, as the boundary sees it.

    Attributes:
        fast: the fast run.
        twin: the full-precision run.
        exact_values: whether the values handed out are the twin's.
        crossing: what is done with outputs and gradients.
        is_current: whether the fast network's weights are still those of the forward pass.
        twin_is_current: whether the twin's are, which may be the wrapped model's own.
        audit: looks at each backward pass, and may put better gradients in the place of its own. It is given the
            outputs; None if the caller has written into them.
    """

    fast: Run
    twin: Run
    exact_values: bool
    crossing: Crossing
    is_current: Callable[[], bool]
    twin_is_current: Callable[[], bool]
    audit: Audit | None = None
    output: Packed | None = None

    def __post_init__(self) -> None:
        self.watches = WATCHES.get()

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """Run with gradients through the boundary; returns the model's output."""
        outputs = Boundary.apply(self, *tensors)  # type: ignore[no-untyped-call]
        if self.output is None:
            raise RuntimeError("expected the boundary to leave the structure of the output, got none")
        return self.output.rebuild(outputs)

    def values(self, tensors: Sequence[Tensor], *, exact: bool) -> Any:
        """The model's output without gradients, from the twin or from the fast run."""
        return _with_tensors((self.twin if exact else self.fast).values(tensors, self.crossing)).tree()

    def record(self, tensors: Sequence[Tensor], needs: list[bool]) -> Tape:
        """Run the fast network with a graph of its own."""
        crossing = replace(self.crossing, counts_outputs=False) if self.exact_values else self.crossing
        tape = self.fast.record(tensors, needs, crossing)
        _with_tensors(tape.output)
        return tape


def _with_tensors(output: Packed) -> Packed:
    if output.hiding or not output.tensors:
        found = f"tensors inside a {output.hiding[0]}" if output.hiding else "one in which no tensor is seen"
        raise TypeError(
            f"expected an output of tensors, in tuples, lists, dicts, data classes or classes known to PyTorch, got "
            f"{found}: return one of these (attacks want logits), or register the class with torch.utils._pytree"
        )
    return output


class Boundary(torch.autograd.Function):
    """The whole fast run as one node of the caller's graph."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the network on its own graph, which stays inside this node."""
        needs = list(ctx.needs_input_grad[1:])
        with forward_ad._set_fwd_grad_enabled(True):  # PyTorch disables it in here, and the model may use it
            tape = call.record(tensors, needs)
            output = tape.output
            if call.exact_values:
                output = call.twin.values([t.detach().clone() for t in tensors], call.crossing)  # the model may write
        call.output = output
        ctx.call, ctx.tape, ctx.needs = call, tape, needs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        # Not the same objects: they refer to this node, which would keep itself and all activations alive.
        handed_out = tuple(o.detach() for o in output.tensors)
        ctx.versions = [o._version for o in tape.output.tensors]
        ctx.mark_non_differentiable(*(h for h, d in zip(handed_out, tape.differentiable, strict=True) if not d))
        return handed_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scale, run the network's backward pass, unscale, filter, count."""
        call: Call = ctx.call
        needs: list[bool] = ctx.needs
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        again = torch.is_grad_enabled() or any(g is not None and _is_batched(g) for g in grads)
        if not call.is_current() or (again and not call.twin_is_current()):
            raise RuntimeError(
                "expected a backward pass with the weights of its forward pass, but the fast model was updated in "
                "between (by update(), or by a forward pass after the wrapped model had changed), or the wrapped model "
                "has changed and create_graph=True computes anew with its weights. Run the forward pass again, or call "
                "backward() before the weights change"
            )
        # An autocast region around backward() would lower the products of a network in full precision.
        with autocast(call.crossing.state.device.type, None), without_anomaly_mode(), without_reentrant_checkpoints():
            if again:
                return None, *_differentiable(call, tensors, needs, grads)
            tape: Tape | None = ctx.tape
            keep = _graph_is_kept()
            ctx.tape = tape if keep else None
            return None, *_pull(call, tape, tensors, needs, grads, keep=keep, versions=ctx.versions)


def _graph_is_kept() -> bool:
    """Whether the caller asked for ``retain_graph``; where PyTorch does not tell, a later pass recomputes."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(kept()) if kept else False


def _is_batched(grad: Tensor) -> bool:
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad))


def _pull(
    call: Call,
    tape: Tape | None,
    tensors: Sequence[Tensor],
    needs: list[bool],
    grads: Sequence[Tensor | None],
    *,
    keep: bool,
    versions: list[int],
) -> Iterator[Tensor | None]:
    """One backward pass of the fast network; the forward pass is run again where its tape is gone or overwritten."""
    pulled = tape.pull(grads, keep=keep) if tape is not None else None
    while tape is None or pulled is None:
        tape = call.record(tensors, needs)
        versions = [o._version for o in tape.output.tensors]
        pulled = tape.pull(grads, keep=False)
    if call.audit is not None:
        outputs = tape.output.tensors
        written_into = [o._version for o in outputs] != versions  # -inf for a class to be left out, say
        pulled = call.audit(tensors, needs, grads, pulled, None if written_into else outputs)
    if pulled.spoilt is not None:
        entries = sum(g.numel() for g in pulled.gradients)
        call.crossing.state.count_pass(samples=pulled.spoilt.numel(), entries=entries)
        for watch in call.watches:
            watch.add(pulled.spoilt)
    found = iter(pulled.gradients)
    for tensor, need in zip(tensors, needs, strict=True):
        yield next(found).to(tensor.dtype) if need else None


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
