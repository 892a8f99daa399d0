"""What becomes of the parts of a copied network: mixins for layers and batch norms whose class is changed in place."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..modules import become
from .following import ScaleAndShift
from .own_forward import OwnForward, batch_norm_input

_FROZEN = "frozen_batch_norm"


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
    """Mixin for a batch norm subclass that runs what is left of its forward."""

    balance: Balance
    left: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run what is left."""
        self.balance.more -= 1
        return self.left(self, *args, **kwargs)


def swap(part: nn.Module, affine: ScaleAndShift | None, own: OwnForward | None) -> None:
    """Give a batch norm the class that does what is left of it."""
    if own is None:
        _freeze(part, affine) if affine is not None else become(part, Skipped)
        return
    if affine is not None:
        part.add_module(_FROZEN, frozen := nn.Module())
        _freeze(frozen, affine)
    if (frozen_too := affine is not None) not in own.left:  # to write and compile it takes a millisecond
        own.left[frozen_too] = _written(own, part, frozen=frozen_too)
    become(part, Rewritten)
    vars(part)["left"] = own.left[frozen_too]


def _freeze(part: nn.Module, affine: ScaleAndShift) -> None:
    become(part, Affine)
    vars(part)["scale_and_shift"] = affine


def _written(own: OwnForward, part: nn.Module, *, frozen: bool) -> Callable[..., Any]:
    """The code of a forward without its batch norm, or with the frozen one; it keeps nothing of this part."""
    graph, places = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(own.graph, places))
    node = places[own.norm]
    rest = batch_norm_input(node)
    if frozen:
        with graph.inserting_before(node):
            rest = graph.call_module(_FROZEN, (rest,))
    node.replace_all_uses_with(rest)
    graph.erase_node(node)
    graph.owning_module = part  # type: ignore[assignment]  # any module will do, to see what is dead
    graph.eliminate_dead_code()
    graph.owning_module = None
    return type(fx.GraphModule(part, graph)).forward
