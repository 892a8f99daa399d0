"""The published four-trick recipe, written afresh as the baseline to compare with.

Mixed precision in the attack, no parameter gradients, convolution and batch norm folded, channels-last memory: each
trick as commonly described, without scaling or filtering of gradients unless a fixed loss scale is asked for. Folding
traces the model with `torch.fx` at every update, which is how the recipe is written down.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself; the gradient that comes back through it is multiplied by `factor`, in its own dtype."""
    out: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return out


def fold_by_tracing(model: nn.Module) -> fx.GraphModule:
    """Trace the eval-mode `model` and fold every batch norm that directly follows a convolution nobody else reads.

    Returns:
        The traced network, which shares no tensor with `model`.
    """
    traced = fx.symbolic_trace(model)
    modules = dict(traced.named_modules())
    folded: set[str] = set()
    for node in list(traced.graph.nodes):
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        norm, conv = modules[str(node.target)], modules[str(source.target)]
        if isinstance(norm, _NORMS) and isinstance(conv, _CONVOLUTIONS):
            traced.set_submodule(str(source.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
            folded.add(str(source.target))
    traced.delete_all_unused_submodules()
    traced.recompile()
    _own_the_rest(traced, folded)
    return traced


def _own_the_rest(traced: fx.GraphModule, folded: set[str]) -> None:
    """Copy what tracing shares with the original; folded convolutions are new already."""
    for node in traced.graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target not in folded:
            traced.set_submodule(target, copy.deepcopy(traced.get_submodule(target)))
        elif node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            holder = traced.get_submodule(owner)
            setattr(holder, name, copy.deepcopy(getattr(holder, name)))


class RecipeModel(nn.Module):
    """A model prepared by the published recipe.

    Args:
        model: the network; its weights are read at every `update()`, it is left in eval mode.
        dtype: of the autocast region; None for none (float32).
        loss_scale: number that the gradient is multiplied by at the logits and divided by, in float32, at the input.
        channels_last: lay out weights and images in channels-last order.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        loss_scale: float = 1.0,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.loss_scale = loss_scale
        self.channels_last = channels_last
        # In a tuple, so that the original is no submodule: the attack libraries change modes of all submodules.
        self._source = (model,)
        self.update()

    def update(self) -> RecipeModel:
        """Trace, fold, freeze and lay out again; needed after every change of the weights."""
        self.network = fold_by_tracing(self._source[0].eval()).requires_grad_(False)
        if self.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to float32 logits (N, classes)."""
        scaled = self.loss_scale != 1.0
        entered = scale_gradient(x, 1.0 / self.loss_scale) if scaled else x
        if self.channels_last:
            entered = entered.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            logits: Tensor = self.network(entered).float()
        return scale_gradient(logits, self.loss_scale) if scaled else logits
