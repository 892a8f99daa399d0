"""The options of a fast model as a type, for adapters and functions that hand them on."""

from typing import Literal, TypedDict

import torch

from .boundary import LossScale
from .modules import Decisions, EngineName


class FastAttackOptions(TypedDict, total=False):
    """The keyword arguments of :class:`~fastadv_adapters.FastAttackModel`, which says what they mean; none is needed.

    A function that hands them on as ``**options: Unpack[FastAttackOptions]`` is checked as that class is.
    """

    dtype: torch.dtype | Literal["auto"]
    fuse_bn: bool
    channels_last: bool | Literal["auto"]
    loss_scale: LossScale
    decisions: Decisions
    logits_dtype: torch.dtype
    engine: EngineName
    auto_update: bool


def refuse_options(options: FastAttackOptions) -> None:
    """Raise a ValueError if any are given for an attack whose model is fast already."""
    if options:
        raise ValueError(
            f"expected no options for an attack on a model that is fast already, got {', '.join(options)}: give them "
            f"to FastAttackModel, or accelerate the attack on the plain model"
        )
