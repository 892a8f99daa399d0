"""Operators of our own for processors, exact to the rounding of PyTorch's own.

``shapes`` replaces a convolution's backward pass by one that keeps no input; ``prepacked`` lays its weight out once,
``linear`` that of linear layers; ``depthwise`` and ``few_channels`` find the gradient of such layers by a forward
convolution; ``winograd`` multiplies less in 3x3 convolutions, by the transforms in ``filters``. ``routing``
has modules run ``attention`` and ``pooling`` in the place of PyTorch's, in ``multi_head`` too, depthwise convolutions
``by_function``, and in ``widening`` what half precision serves badly. ``group_norm`` takes the detour over float32.
``calls`` tells what surrounds an operator.

``prepared`` has switches for what nobody has measured, on CUDA: ``narrow`` norms, ``first`` layers on more channels.
"""

from .first import pad_first
from .group_norm import widen_group_norm
from .linear import lay_linear_out
from .narrow import narrow_names
from .prepacked import is_laid_out, lay_nothing_out
from .prepared import SWITCHES, switched
from .routing import route
from .shapes import input_gradient, keep_shape_only

__all__ = [
    "SWITCHES",
    "input_gradient",
    "is_laid_out",
    "keep_shape_only",
    "lay_linear_out",
    "lay_nothing_out",
    "narrow_names",
    "pad_first",
    "route",
    "switched",
    "widen_group_norm",
]
