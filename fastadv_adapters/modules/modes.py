"""Parts of a model that stay in training mode though the model is in eval mode."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from .walking import named_modules_of


def left_in_training(model: nn.Module) -> dict[str, nn.Module]:
    """The parts that may compute something else in training mode, and are in it, by name; none if the model itself is.

    A model's own ``train()`` may keep them there, or its user may have set them so.
    """
    if model.training:
        return {}
    return {name: part for name, part in named_modules_of(model) if part.training and _differs(part)}


def _differs(part: nn.Module) -> bool:
    """Whether training mode is another function for this part; of a class that is not PyTorch's own, it may be."""
    if not type(part).__module__.startswith("torch."):
        return True
    if isinstance(part, _NormBase):
        return part.running_mean is not None
    return isinstance(part, nn.RReLU) or (isinstance(part, (_DropoutNd, nn.RNNBase)) and _rate(part) > 0)


def _rate(part: nn.Module) -> float:
    return float(getattr(part, "p", 0.0) or getattr(part, "dropout", 0.0))
