"""What ``SafePGD`` accepts: its settings, its inputs and the model's output. Errors say what to do."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # private by name, see boundary/packing.py

from ..boundary import Packed
from ..modules import is_out_of_memory, lacking_axis, lone_image, same_device, widest_on

LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""The dtypes of class labels."""

BYTES = 8
"""Values from 0 to more than this are those of bytes: normalised by mean and std, images end at 3 or so."""


def accept_size(name: str, value: Any) -> float:
    """A budget or step size as a float.

    Args:
        name: what errors call it.
        value: a finite number of at least 0, in units of x.

    Raises:
        TypeError: not a number.
        ValueError: negative, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number, got {type(value).__name__}. Pass a float in units of x")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"expected {name} to be finite and at least 0, got {value}. Pass a length in units of x")
    return number


def accept_count(name: str, value: Any, *, least: int) -> int:
    """A number of steps or restarts; it must be an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be an int, got {type(value).__name__} {value!r}. Pass a whole number")
    if value < least:
        raise ValueError(f"expected {name} to be at least {least}, got {value}. Pass {least} or more")
    return value


def accept_bounds(bounds: Any) -> tuple[float, float]:
    """The least and the largest value of an input, as floats.

    Args:
        bounds: two numbers, the lower one first.

    Raises:
        TypeError: not two numbers.
        ValueError: the first is not below the second.
    """
    try:
        lower, upper = (float(b) for b in bounds)
    except (TypeError, ValueError):
        raise TypeError(f"expected bounds to be two numbers (lower, upper), got {bounds!r}. Pass (0, 1), say") from None
    if not lower < upper:
        raise ValueError(f"expected bounds (lower, upper) with lower < upper, got {bounds!r}. Swap or widen them")
    return lower, upper


def accept_generator(generator: Any) -> torch.Generator | None:
    """The source of random starts."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"expected generator to be a torch.Generator or None, got {type(generator).__name__}. "
            f"Pass torch.Generator().manual_seed(0), say"
        )
    return generator


def accept_classes(classes: Any) -> bool | None:
    """Whether targets are class labels, None for what they look like."""
    if classes is not None and not isinstance(classes, bool):
        raise TypeError(f"expected classes to be True, False or None, got {classes!r}. Pass one of these")
    return classes


def accept_inputs(x: Any, y: Any, device: torch.device, bounds: tuple[float, float]) -> int:
    """Check inputs and labels of one attack, and return the largest label (-1 for an empty batch).

    Waits for the device, once.

    Args:
        x: shape (N, ...), floating, finite, within ``bounds``, on ``device``.
        y: shape (N,), integers of at least 0, on x's device.
        device: the device that the model is on.
        bounds: least and largest value of an input.

    Raises:
        TypeError, ValueError: x or y is not as described.
    """
    _accept_tensor("x", x)
    _accept_tensor("y", y)
    _accept_kind(x)
    _accept_labels(x, y)
    _accept_device("x", x, device, "where the model is")
    _accept_device("y", y, x.device, "where x is")
    if len(x) == 0:
        return -1
    least, largest, first, last = _extremes(x, y)
    _accept_values(x.dtype, least, largest, bounds)
    if first < 0:
        raise ValueError(f"expected labels of at least 0, got {int(first)} in y. Drop samples without a label")
    return int(last)


def accept_targets(x: Any, y: Any, device: torch.device, bounds: tuple[float, float]) -> None:
    """Check inputs and targets without classes of one attack. Waits for the device, once."""
    _accept_tensor("x", x)
    _accept_kind(x)
    _accept_device("x", x, device, "where the model is")
    for leaf in pytree.tree_leaves(y):
        _accept_target(x, leaf)
    if len(x):
        least, largest = _extremes(x)
        _accept_values(x.dtype, least, largest, bounds)


def accept_logits(logits: Any, samples: int, largest_label: int) -> Tensor:
    """The model's output as logits (N, C) with a class for every label."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != samples:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"expected the model to return logits of shape ({samples}, C), got {got}. Wrap a model that returns "
            f"anything else in a module that returns its logits, or give SafePGD classes=False and a loss of your own"
        )
    if largest_label >= logits.shape[1]:
        raise ValueError(
            f"expected labels below the number of classes, {logits.shape[1]}, got {largest_label} in y. Count "
            f"labels from 0, and check that they belong to the model's task"
        )
    return logits


def accept_classifier(model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """What a model makes of inputs (N, ...) as logits (N, C) of at least two classes.

    Raises:
        ValueError: it does not take such inputs, or returns something else.
    """
    try:
        logits: object = model(x.clone())  # it may write into it
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if lack := lacking_axis(model, [x]):
            raise ValueError(
                f"expected images of shape {lack} (the model raised {type(error).__name__}: {error})"
            ) from error
        raise ValueError(
            f"expected the model to take inputs of shape {tuple(x.shape)} and {x.dtype}, got {type(error).__name__}: "
            f"{error}: pass what the model was made for"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        if isinstance(logits, Tensor) and logits.ndim < 2 and (lack := lacking_axis(model, [x])):
            raise ValueError(f"expected images of shape {lack}")
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"expected the model to return logits of shape ({len(x)}, C), C at least 2, got {got}: wrap a model that "
            f"returns anything else in a module that returns its logits"
        )
    return logits


def _accept_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"expected {name} to be a torch.Tensor, got {type(value).__name__}. Convert it: torch.as_tensor"
        )


def _accept_kind(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(
            f"expected x to be floating, got {x.dtype}. Convert it, and scale it to the bounds: x.float() / 255, say"
        )
    if x.ndim < 2 or math.prod(x.shape[1:]) == 0:
        raise ValueError(f"expected x of shape (N, ...) with values per sample, got {tuple(x.shape)}. Add a dimension")


def _accept_labels(x: Tensor, y: Tensor) -> None:
    if y.shape != x.shape[:1]:  # before the dtype: one-hot rows are often floating, and stay rows as integers
        raise ValueError(
            f"expected y of shape ({len(x)},), one label per sample of x, got {tuple(y.shape)}. Pass class indices, "
            f"not one-hot rows, for the same samples as x{lone_image(x, y)}"
        )
    if y.dtype not in LABELS:
        raise TypeError(
            f"expected y to hold integer class labels, got {y.dtype}. Convert it with .long(), or pass SafePGD a "
            f"callable loss that takes other targets"
        )


def _accept_target(x: Tensor, leaf: Any) -> None:
    tensors = Packed(leaf).tensors  # several, of a data class
    if not tensors and leaf is not None:
        raise TypeError(
            f"expected targets to be tensors, got {type(leaf).__name__} in y. Convert it to a tensor with a row per "
            f"sample, or let the loss hold what all samples share"
        )
    for tensor in tensors:
        if tensor.ndim == 0 or len(tensor) != len(x):
            raise ValueError(
                f"expected targets with {len(x)} rows, one per sample of x, got shape {tuple(tensor.shape)} in y. "
                f"Pass those of the same samples, or let the loss hold what all samples share"
            )
        _accept_device("y", tensor, x.device, "where x is")


def _accept_device(name: str, value: Tensor, device: torch.device, whose: str) -> None:
    if not same_device(value.device, device):
        raise ValueError(f"expected {name} on {device}, {whose}, got {value.device}. Move it with .to({str(device)!r})")


def _extremes(*tensors: Tensor) -> list[float]:
    """The least and the largest value of each, in one wait for the device."""
    wide = widest_on(tensors[0].device)
    extremes = [e.to(wide) for t in tensors for e in (t.detach().amin(), t.detach().amax())]
    found: list[float] = torch.stack(extremes).tolist()
    return found


def _accept_values(dtype: torch.dtype, least: float, largest: float, bounds: tuple[float, float]) -> None:
    if not (math.isfinite(least) and math.isfinite(largest)):
        raise ValueError("expected x to be finite, got NaN or infinite values in it. Find out where they come from")
    lower, upper = (torch.tensor(b, dtype=dtype, device="cpu").item() for b in bounds)
    if least < lower or largest > upper:
        if bounds == (0.0, 1.0) and least >= 0 and BYTES < largest <= 255:
            advice = "Divide x by 255; or, if the model takes such values, pass bounds=(0, 255), and eps in these units"
        else:
            advice = (
                "If x is normalised by mean and std, put the normalisation into the model "
                "(nn.Sequential(Normalize, model)) and give images within bounds. If not, pass the bounds of your data "
                "as bounds=(lower, upper), or clamp x"
            )
        raise ValueError(
            f"expected x within bounds ({bounds[0]:g}, {bounds[1]:g}), got values from {least:g} to {largest:g}. "
            f"{advice}"
        )
