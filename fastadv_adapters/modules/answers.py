"""What a model answers to a library of attacks: logits, or an error that says so in the place of the library's own."""

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn

from .axes import lacking_axis

LIBRARIES = ("torchattacks", "foolbox", "pyautoattack", "autoattack")
_BETWEEN = ("torch.nn.modules.module", "torchattacks.attack", "fastadv_adapters.foolbox.models")
"""Modules whose frames stand between a model and the attack that calls it. (Attacks of users also call the model
through ``torchattacks.attack``; they may take more than logits.)"""


def accept_answer(output: Any, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
    """The output of the forward pass of a fast model, which calls this at its end.

    Raises:
        ValueError: one of ``LIBRARIES`` has called, and the output is no tensor, or is that of one image without a
            batch axis.
    """
    if isinstance(output, Tensor) and output.ndim > 1:
        return output
    library = _library_at(sys._getframe())
    if library and not isinstance(output, Tensor):
        raise ValueError(
            f"expected the model to return logits (N, C), which is what {library} takes, got {type(output).__name__}: "
            f"wrap {type(model).__name__} in a module whose forward(x) returns the logits alone, {_logits_in(output)}"
        )
    if library and (lack := lacking_axis(model, tensors)):
        raise ValueError(f"expected images of shape {lack}")
    return output


def _library_at(frame: FrameType | None) -> str:
    """The library whose code has called the fast model, whose own frames are the first ones; or nothing."""
    while _module_of(frame).split(".")[0] == "fastadv_adapters":
        frame = frame.f_back if frame else None
    while _module_of(frame) in _BETWEEN:
        frame = frame.f_back if frame else None
    root = _module_of(frame).split(".")[0]
    return root if root in LIBRARIES else ""


def _module_of(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def _logits_in(output: Any) -> str:
    """How logits are read off an output, by guess."""
    if isinstance(output, Mapping):
        return f"model(x)[{'logits' if 'logits' in output else next(iter(output))!r}] say"
    return "model(x)[0] say" if isinstance(output, Sequence) else "model(x).logits say"
