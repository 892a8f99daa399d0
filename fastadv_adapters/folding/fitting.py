"""Whether a layer can hold the batch norm behind it, and if not, why."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules import MATRIX_LAYERS, has_hooks
from .following import outputs_of
from .scales import channels_of
from .tracing import Trace, holds_parameters

_LAYERS = tuple(kind for kind in MATRIX_LAYERS if kind is not nn.modules.linear.NonDynamicallyQuantizableLinear)


def why_not(name: str, layer: nn.Module, norm: _BatchNorm, trace: Trace) -> str:
    """Why this batch norm does not fold into the layer of this name; "" if it does."""
    if type(layer) not in _LAYERS:
        return f"{name} is a {type(layer).__name__}, which may use its weight in its own way"
    if has_hooks(layer):
        return f"{name} has hooks"
    if name in trace.touched | trace.unseen:
        return f"the weight of {name} is read by other code too"
    if not holds_parameters(layer):
        return f"the weight or the bias of {name} is no parameter"
    outputs = outputs_of(layer)
    if channels_of(norm) != outputs:
        return f"{name} has {outputs} outputs for {channels_of(norm)} channels"
    return ""
