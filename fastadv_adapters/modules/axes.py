"""Images without a batch or a channel axis: noticed by what the first convolution of a model takes, once it fails."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .copying import clone, copy_module
from .inputs import shapes
from .randomness import random_state_kept
from .walking import modules_of

_SPACE = {3: "L", 4: "H, W", 5: "D, H, W"}
"""Names of the axes behind N and C, by the number of all."""


def lacking_axis(model: object, tensors: Sequence[Tensor]) -> str | None:
    """Shapes that are wanted and given, and what adds the axis that inputs lack; None if they lack none.

    A model may add the axis by itself and fail for another reason. So a copy of it is run on inputs with the axis, and
    nothing is said if they fail too. Ask this of a model that has failed alone.

    Args:
        model: that was called.
        tensors: what it was called with, the images first among floating ones.
    """
    place = next((place for place, t in enumerate(tensors) if t.is_floating_point()), None)
    layers = modules_of(model) if isinstance(model, nn.Module) else ()
    first = next((part for part in layers if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if not isinstance(model, nn.Module) or first is None or place is None:
        return None
    x, channels = tensors[place], first.in_channels
    if x.ndim != first.weight.ndim - 1:
        return None
    sample, times = ", ".join(map(str, x.shape[1:])), (1, channels, *[1] * (x.ndim - 1))
    grey, advice = x.unsqueeze(1).expand(-1, channels, *x.shape[1:]), "add the channel axis with x.unsqueeze(1)"
    ways = [(grey, f"(N, {sample})", advice if channels == 1 else f"{advice}.repeat{times}")]
    if len(x) == channels > 1:
        ways.insert(0, (x.unsqueeze(0), f"({channels}, {sample})", "add the batch axis with x.unsqueeze(0)"))
    for images, got, advice in ways:
        if _takes(model, first.weight, images, [tensors[:place], tensors[place + 1 :]]):
            return f"(N, {channels}, {_SPACE[images.ndim]}), got {got}: {advice}"
    return None


def _takes(model: nn.Module, weight: Tensor, images: Tensor, others: Sequence[Sequence[Tensor]]) -> bool:
    """Whether a copy of the model, in eval mode, makes a row of each image, given what comes before and behind them."""
    try:
        with torch.no_grad(), random_state_kept(images.device):
            output = copy_module(model, clone)(*others[0], images.to(weight).contiguous(), *others[1])
    except Exception:
        return False
    return not isinstance(output, Tensor) or (output.ndim > 1 and len(output) == len(images))


def lone_image(x: Tensor, y: Tensor) -> str:
    """What to add to an error about lengths if x may be one image without the batch axis, as one label says."""
    alone = x.ndim == 3 and y.numel() == 1
    return ". One image without the batch axis needs x.unsqueeze(0), and its label y.reshape(1)" if alone else ""


def refused(model: nn.Module, tensors: Sequence[Tensor], error: Exception) -> str:
    """The inputs that a model refused in words, its error, and the axis that they lack."""
    lack = lacking_axis(model, tensors)
    return f"{shapes(tensors)}: {error}{f' (expected images of shape {lack})' if lack else ''}"
