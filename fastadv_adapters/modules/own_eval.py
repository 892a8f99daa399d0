"""What becomes of a model in training mode that is put into eval mode by its own ``eval()``."""

import torch
from torch import nn

from .copying import clone, copied_as_it_is, to_eval_mode
from .switching import has_own_switch, switch


@torch.inference_mode(False)
def by_its_own_eval(module: nn.Module) -> nn.Module | None:
    """A copy of a model in training mode as its ``eval()`` makes it, if other copies are not, for that writes weights.

    None if they are, or if it raises.
    """
    copied = copied_as_it_is(module, clone) if module.training and has_own_switch(module) else None
    if copied is None or switch(copied, module) is not False:
        return None
    to_eval_mode(copied)
    return copied
