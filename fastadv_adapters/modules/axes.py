"""Images without a batch or a channel axis: noticed by what the first convolution of a model takes, once it fails."""

from collections.abc import Sequence

from torch import Tensor, nn

from .inputs import shapes

_SPACE = {3: "L", 4: "H, W", 5: "D, H, W"}
"""Names of the axes behind N and C, by the number of all."""


def lacking_axis(model: object, tensors: Sequence[Tensor]) -> str | None:
    """Shapes that are wanted and given, and what adds the axis that inputs seem to lack; None if they lack none.

    Ask this of a model that has failed alone: another one may add the axis by itself.

    Args:
        model: that was called.
        tensors: what it was called with, the images first among floating ones.
    """
    x = next((t for t in tensors if t.is_floating_point()), None)
    layers = model.modules() if isinstance(model, nn.Module) else ()
    first = next((part for part in layers if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if first is None or x is None or x.ndim != first.weight.ndim - 1:
        return None
    channels, sample = first.in_channels, ", ".join(map(str, x.shape[1:]))
    got, advice = f"(N, {sample})", "add the channel axis with x.unsqueeze(1)"
    if channels > 1:
        alone = len(x) == channels
        got, advice = (f"({channels}, {sample})", "") if alone else (got, f", or the channel axis {channels} times")
        advice = f"add the batch axis with x.unsqueeze(0){advice}"
    return f"(N, {channels}, {_SPACE[x.ndim + 1]}), got {got}: {advice}"


def lone_image(x: Tensor, y: Tensor) -> str:
    """What to add to an error about lengths if x may be one image without the batch axis, as one label says."""
    alone = x.ndim == 3 and y.numel() == 1
    return ". One image without the batch axis needs x.unsqueeze(0), and its label y.reshape(1)" if alone else ""


def refused(model: nn.Module, tensors: Sequence[Tensor], error: Exception) -> str:
    """The inputs that a model refused in words, its error, and the axis that they seem to lack."""
    lack = lacking_axis(model, tensors)
    return f"{shapes(tensors)}: {error}{f' (expected images of shape {lack})' if lack else ''}"
