"""Batch norms that have seen no batch yet hide what is wrong with a fold: it changes nothing, and hidden it stays.

Their means are 0, their variances 1, their weights 1 or, at the end of a residual branch, 0. A model is often wrapped
in this state, before it is trained. So a fold is looked at once more with other numbers in them.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules import clone, copy_module, named_modules_of, submodule_of, thaw, to_eval_mode

_RANGES = {"running_mean": (-0.5, 0.5), "running_var": (0.5, 2.0), "weight": (0.5, 1.5), "bias": (-0.5, 0.5)}


def filled_in(source: nn.Module) -> nn.Module | None:
    """A copy with numbers in its blank batch norms, the same in every call; None if it has no such norms."""
    blank = [name for name, part in named_modules_of(source) if isinstance(part, _BatchNorm) and _is_blank(part)]
    if not blank:
        return None
    copied, generator = copy_module(source, clone), torch.Generator("cpu").manual_seed(0)
    thaw(copied, source)
    for name in blank:
        norm = submodule_of(copied, name)
        for key, (low, high) in _RANGES.items():
            tensor: Tensor | None = getattr(norm, key)
            if tensor is not None and bool((tensor == tensor.flatten()[0]).all()):
                numbers = torch.rand(tensor.shape, generator=generator, device="cpu") * (high - low) + low
                tensor.detach().copy_(numbers)
    to_eval_mode(copied)  # once more, for a table may be computed of them
    return copied


def _is_blank(norm: _BatchNorm) -> bool:
    mean = norm.running_mean
    return mean is not None and mean.numel() > 0 and not bool(mean.any())
