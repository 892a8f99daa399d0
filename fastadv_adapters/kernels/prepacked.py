"""Convolutions on a processor whose weights are laid out once per update, as the kernels want them.

oneDNN's kernels read weights in blocks of their own, and PyTorch's operators reorder them anew in every forward and
every backward pass. Here weights stand still between updates, and each pass finds them as the first of its kind left
them. The kernels are the same, and so is what they compute: the gradient at the input of a convolution is the
transposed convolution of the gradient at its output. (Where the stride is above 1, oneDNN may choose another kernel for
that, which rounds otherwise.) Where Winograd's algorithm is faster, its weights take the place of these.

Weights that are laid out here stay in the wrapped model's own layout until then, which makes updates cheaper.

The operators are private in PyTorch up to 2.13; they are those that its own compiler calls. Where they are missing or
refuse a layer, PyTorch's convolution is run.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..modules import Precision, modules_of
from . import depthwise, few_channels, winograd
from .calls import DTYPES, is_onednn, runs_in, unseen
from .depthwise import Spread
from .few_channels import Blocks
from .winograd import Winograd

LEAST = 2**16
"""Weights with fewer entries are reordered in less time than it takes to call these operators."""


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input; the two dimensions in order."""

    kernel: list[int]
    padding: list[int]
    stride: list[int]
    dilation: list[int]

    def left(self, shape: torch.Size) -> list[int]:
        """How many entries no step reads, for each dimension of an input of this shape."""
        sizes = zip(shape[2:], self.kernel, self.padding, self.stride, self.dilation, strict=True)
        return [(size + 2 * pad - dilation * (kernel - 1) - 1) % by for size, kernel, pad, by, dilation in sizes]


@dataclass
class LaidOut:
    """The weights of one layer as its passes want them, best for one shape of input and right for all.

    Attributes:
        geometry, bias, dtype: of the layer.
        forward: the weights for the forward pass.
        backward: those for the backward pass, once there has been one.
    """

    geometry: Geometry
    bias: Tensor | None
    dtype: torch.dtype
    forward: Tensor
    backward: Tensor | None = None
    exact = True

    def convolve(self, input: Tensor) -> Tensor:
        """The layer's output."""
        g = self.geometry
        arguments = input.to(self.dtype), self.forward, self.bias, g.padding, g.stride, g.dilation, 1
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(*arguments, "none", [], "")
        return output

    def gradient(self, grad: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
        """The gradient at an input of this shape from that at the output; not itself differentiable."""
        g, ops = self.geometry, torch.ops.mkldnn
        rest = g.padding, g.left(shape), g.stride, g.dilation, 1
        if self.backward is None:
            self.backward = ops._reorder_convolution_transpose_weight(_by_channels(weight), *rest, list(grad.shape))
        gradient: Tensor = ops._convolution_transpose_pointwise(grad, self.backward, None, *rest, "none", [], "")
        return gradient


Weights = LaidOut | Winograd | Spread | Blocks
"""``exact`` tells whether its gradient may be used now; else PyTorch's own runs. None of them holds the layer, which
holds it: a network that is dropped is freed at once."""

Algorithm = Literal["depthwise", "few channels", "winograd", "laid out"]
"""How a layer is run."""


class Prepacked:
    """What is kept of one layer's weights, made by the first pass that needs it."""

    pays = staticmethod(winograd.pays)
    may: bool | None = None  # whether something may be kept, for some input; to be found out

    def __init__(self) -> None:
        # One attribute: a thread that is late with old weights does not put them among the new ones.
        self._kept: tuple[Tensor | None, int, dict[Algorithm, Any], Any] = None, 0, {}, None
        self._refused: set[Algorithm] = set()

    def find(self, layer: Any, input: Tensor, weight: Tensor) -> Any:
        """The weights for this call; None where PyTorch's own convolution is to be run."""
        if self.may is None:
            self.may = _is_large(layer) or depthwise.may_fit(layer) or few_channels.may_fit(layer)
        way = self._way(layer, input, weight) if self.may else None
        if way is None or way in self._refused:
            return None
        kept_weight, version, kept, bias = self._kept
        if kept_weight is not weight or version != weight._version or bias is not layer.bias:
            kept = {}  # old ones are given back first: new ones take their memory
            self._kept = weight, weight._version, kept, layer.bias
        if way not in kept:
            try:
                with unseen():
                    kept[way] = self._make(way, layer, input.shape, weight)
            except (RuntimeError, AttributeError):  # no memory, or no such operators in this PyTorch or processor
                self._refused.add(way)
                return None
        return kept[way]

    def _way(self, layer: nn.Module, input: Tensor, weight: Tensor) -> Algorithm | None:
        if depthwise.may_fit(layer) and type(weight) is nn.Parameter and depthwise.fits(layer, input, weight):
            return "depthwise"
        if few_channels.may_fit(layer) and few_channels.fits(layer, input, weight):
            return "few channels"
        if not isinstance(layer, nn.Conv2d) or not _is_large(layer) or not _fits(layer, input, weight):
            return None
        return "winograd" if "winograd" not in self._refused and self.pays(layer, input.shape) else "laid out"

    def _make(self, way: Algorithm, layer: Any, shape: torch.Size, weight: Tensor) -> Any:
        if way == "depthwise":
            return depthwise.lay_out(layer, weight)
        if way == "few channels":
            return few_channels.lay_out(layer, weight)
        return (winograd.transform if way == "winograd" else _lay_out)(layer, shape, weight)


def lay_nothing_out(network: nn.Module) -> None:
    """Have all layers of a network run on their weights as they are: it writes into them in a pass, perhaps unseen."""
    for part in modules_of(network):
        for kept in (vars(part).get("prepacked"), vars(part).get("laid_out")):
            if isinstance(kept, Prepacked):
                kept.may = False


def is_laid_out(layer: nn.Module, precision: Precision) -> bool:
    """Whether the weight of a fast network's layer will be laid out here, whatever its own layout is."""
    if type(layer) is not nn.Conv2d or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return False
    runs = precision.device.type == "cpu" and precision.channels_last and torch.backends.mkldnn.is_available()
    return _is_large(layer) and runs and precision.dtype in DTYPES


def _is_large(layer: nn.Module) -> bool:
    """Whether the weight of a layer is worth laying out, for some input."""
    return isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.weight.numel() >= LEAST


def _fits(layer: nn.Conv2d, input: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch would run oneDNN here, channels-last, on a frozen weight that is in the right dtype."""
    if input.device.type != "cpu" or input.ndim != 4:
        return False
    if weight.dtype not in DTYPES or weight.dtype != runs_in(input) or weight.requires_grad:
        return False
    if type(weight) is not nn.Parameter or not input.is_contiguous(memory_format=torch.channels_last):
        return False
    return is_onednn(layer, input, weight)


def _lay_out(layer: nn.Conv2d, shape: torch.Size, weight: Tensor) -> LaidOut:
    g = Geometry(list(layer.kernel_size), list(map(int, layer.padding)), list(layer.stride), list(layer.dilation))
    rest = g.padding, g.stride, g.dilation, 1, list(shape)
    return LaidOut(
        g, layer.bias, weight.dtype, torch.ops.mkldnn._reorder_convolution_weight(_by_channels(weight), *rest)
    )


def _by_channels(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)  # from there the way is short
