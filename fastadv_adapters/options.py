"""The options of a fast model as a type, for adapters and functions that hand them on."""

from collections.abc import Mapping
from typing import Literal, TypedDict

import torch

from .boundary import LossScale
from .modules import Decisions, EngineName, accept_engine, accept_options, accept_precision


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


def check_options(options: FastAttackOptions) -> None:
    """Check options ahead, where the model that would refuse them is made later.

    Raises:
        TypeError: no dictionary, or an option that does not exist.
        ValueError: an unknown value.
    """
    if not isinstance(options, Mapping):
        raise TypeError(
            f"expected options as a dictionary, got {type(options).__name__}: pass what FastAttackModel takes by "
            f'keyword, {{"dtype": torch.float32}} say'
        )
    if unknown := set(options).difference(FastAttackOptions.__annotations__):
        raise TypeError(f"expected options of FastAttackModel, got {', '.join(sorted(unknown))}: check the name")
    flags = {name: options[name] for name in ("fuse_bn", "auto_update") if name in options}
    decisions, logits_dtype = options.get("decisions", "auto"), options.get("logits_dtype", torch.float32)
    accept_engine(options.get("engine", "auto"))
    accept_options(decisions, logits_dtype, options.get("loss_scale"), **flags)
    accept_precision(options.get("dtype", "auto"), options.get("channels_last", "auto"))


def refuse_options(options: FastAttackOptions) -> None:
    """Raise a ValueError if any are given for an attack whose model is fast already."""
    if options:
        raise ValueError(
            f"expected no options for an attack on a model that is fast already, got {', '.join(options)}: give them "
            f"to FastAttackModel, or accelerate the attack on the plain model"
        )
