"""What becomes of the parts of a copied network: mixins for layers and batch norms whose class is changed in place."""

import threading
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..modules import become
from .following import ScaleAndShift
from .tracing import batch_norm_input


class Balance(threading.local):
    """How often a folded layer was called more than its batch norm, in this thread's present run."""

    more = 0


class Skipped:
    """Mixin for a batch norm that is now part of the layer before it."""

    balance: Balance

    def forward(self, input: Tensor) -> Tensor:
        """Hand the input on."""
        self.balance.more -= 1
        return input


class Joined:
    """Mixin for a layer that a batch norm was folded into."""

    balance: Balance

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, and count."""
        self.balance.more += 1
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class Affine:
    """Mixin for a batch norm frozen into ``input * scale + shift``, in the dtype of its input."""

    scale_and_shift: ScaleAndShift

    def forward(self, input: Tensor) -> Tensor:
        """Scale and shift."""
        own = self.scale_and_shift
        # Another dtype comes out of an autocast region of the model's own.
        scale, shift = own[input.dtype] if input.dtype in own else next(iter(own.values())).to(input.dtype)
        shape = (-1,) + (1,) * (input.ndim - 2)
        return torch.addcmul(shift.view(shape), input, scale.view(shape))


class Rewritten:
    """Mixin for a batch norm subclass whose forward runs from its own trace, without the batch norm in it."""

    balance: Balance
    rewritten: fx.GraphModule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run what is left."""
        self.balance.more -= 1
        return self.rewritten(*args, **kwargs)


def swap(part: nn.Module, affine: ScaleAndShift | None, own_forward: tuple[fx.Graph, fx.Node] | None) -> None:
    """Give a batch norm the class that does what is left of it."""
    if own_forward is None:
        become(part, Skipped if affine is None else Affine)
        if affine is not None:
            vars(part)["scale_and_shift"] = affine
        return
    graph, node = own_forward
    if affine is None:
        node.replace_all_uses_with(batch_norm_input(node))
    else:
        frozen = nn.Module()
        become(frozen, Affine)
        vars(frozen)["scale_and_shift"] = affine
        part.add_module("frozen_batch_norm", frozen)
        with graph.inserting_before(node):
            new = graph.call_module("frozen_batch_norm", (batch_norm_input(node),))
        node.replace_all_uses_with(new)
    graph.erase_node(node)
    graph.owning_module = part  # type: ignore[assignment]  # any module will do, to see what is dead
    graph.eliminate_dead_code()
    graph.owning_module = None
    rewritten = fx.GraphModule(part, graph)
    rewritten._parameters, rewritten._buffers = part._parameters, part._buffers  # those that refreshes write to
    become(part, Rewritten)
    part.rewritten = rewritten
