"""Operators of our own for processors, exact to the rounding of PyTorch's own.

``shapes`` replaces a convolution's backward pass by one that keeps no input; ``prepacked`` lays its weight out once,
``linear`` that of linear layers; ``depthwise`` finds the gradient of depthwise layers by a forward convolution;
``winograd`` multiplies less in 3x3 convolutions, by the transforms in ``filters``;
``routing`` has modules run ``attention`` and ``pooling`` in the place of PyTorch's. ``group_norm`` takes the
detour over float32. ``calls`` tells what surrounds an operator.
"""

from .group_norm import widen_group_norm
from .linear import lay_linear_out
from .prepacked import is_laid_out
from .routing import route
from .shapes import keep_shape_only

__all__ = ["is_laid_out", "keep_shape_only", "lay_linear_out", "route", "widen_group_norm"]
