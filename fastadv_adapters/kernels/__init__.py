"""Operators of our own for processors, exact to the rounding of PyTorch's own.

``shapes`` replaces a convolution's backward pass by one that keeps no input; ``prepacked`` lays its weight out once,
``linear`` that of linear layers; ``depthwise`` finds the gradient of depthwise layers by a forward convolution;
``winograd`` multiplies less in 3x3 convolutions, by the transforms in ``filters``;
``routing`` has modules run ``attention`` and ``pooling`` in the place of PyTorch's. ``calls`` tells what
surrounds them.
"""

from .linear import lay_linear_out
from .prepacked import is_laid_out
from .routing import route
from .shapes import keep_shape_only

__all__ = ["is_laid_out", "keep_shape_only", "lay_linear_out", "route"]
