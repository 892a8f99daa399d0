"""3 x 3 convolutions in float32 on a processor with far fewer multiplications.

Winograd's minimal filtering (Lavin and Gray 2016, https://arxiv.org/abs/1509.09308, section 4.1): along one dimension,
some outputs of a kernel g over inputs d are  A'[(G g) * (B' d)],  with fewer products than a sum has terms; in two
dimensions both are transformed along each. Summed over channels, each product in the middle is one entry of a matrix
product. The transforms around it only scale and add, and that of the weights is done once per update.

With stride 1, tiles have 4 rows and 2 columns of outputs: 24 multiplications for 72. How much that rounds depends on
the points at which the polynomials behind the algorithm are taken (Barabasz et al. 2018,
https://arxiv.org/abs/1803.10986). With those below the error is that of PyTorch's own convolution, whose sums have 9
times as many terms. With stride 2, a convolution is one of the odd entries with two weights and one of the even entries
with one: tiles have 2 x 2 outputs, 25 multiplications for 36, and the transforms only add.

The products are MKL's batched ones on Intel's processors. On others these take twice as long, and the products are one
grouped 1 x 1 convolution of oneDNN, with weights that it has laid out.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import HAS_FAST_MKL
from .filters import DOUBLE, FOUR, HALVE, TWO, Filter

ENOUGH = {1: 80.0, 2: 160.0}
"""By stride: from here on the multiplications that are spared cost more than the transforms; inputs * outputs /
(inputs + outputs) of a layer, in channels."""

ROWS = 128
"""Matrix products with fewer rows are bound by reading the weights."""

_ONE_BY_ONE = [0, 0], [1, 1], [1, 1]  # padding, stride and dilation
_ENTRIES = 2**18  # of transformed tiles per thread, if ROWS does not need more: they stay in its cache
_MOST = 2**21  # of those of one image; a block has one at least


@dataclass(frozen=True)
class _Pass:
    """What one pass computes: an algorithm for each dimension, and where the input lies in what the tiles read.

    Attributes:
        rows, columns: the algorithms.
        before: rows and columns of zeros before the input.
    """

    rows: Filter
    columns: Filter
    before: tuple[int, int]

    def tiles(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tiles that cover an output of this size."""
        return math.ceil(size[0] / self.rows.outputs), math.ceil(size[1] / self.columns.outputs)

    def transform(self, kernels: Tensor, *, turned: bool = False) -> Tensor:
        """G g G' of kernels (to, from, 3, 3), which may be turned round before: (products, to, from)."""
        rows, columns = kernels.new_tensor(self.rows.matrix), kernels.new_tensor(self.columns.matrix)
        both = torch.einsum("ai,bj->abij", rows, columns).reshape(-1, 9)
        each = kernels.contiguous().view(-1, 9).t()
        return ((both.flip(1) if turned else both) @ each).view(-1, *kernels.shape[:2])


@dataclass
class Winograd:
    """The transformed weights of one layer, for all shapes of input.

    Attributes:
        bias: of the layer.
        padding: of the layer, rows and columns.
        stride: of the layer, 1 or 2.
        forward: weights for the forward pass, from inputs to outputs.
        backward: those for the backward pass, from outputs to inputs, once there has been one.
    """

    bias: Tensor | None
    padding: tuple[int, int]
    stride: int
    forward: "Products"
    backward: "Products | None" = None

    @property
    def exact(self) -> bool:
        """Whether :meth:`gradient` may be used now, for products are those of float32; else PyTorch's own runs."""
        return _products_are_float32()

    def convolve(self, input: Tensor) -> Tensor:
        """The layer's output."""
        size = _size(input.shape, self.padding, self.stride)
        return _convolve(input, self.forward, self.bias, _forward(self.padding, self.stride), size)

    def gradient(self, grad: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
        """The gradient at an input of this shape from that at the output; not itself differentiable."""
        way = _backward(self.padding, self.stride)
        if self.backward is None:
            # With stride 1 it is the convolution of that at the output with the kernel turned round.
            matrices = way.transform(weight.transpose(0, 1), turned=self.stride == 1)
            self.backward = Products(matrices, grad.shape, way.tiles(shape[2:]))
        return _convolve(grad, self.backward, None, way, shape[2:])


class Products:
    """Matrices (products, outputs, inputs), for rows of one block after the other.

    Args:
        matrices: what to multiply with.
        shape: of the images, (N, inputs, rows, columns).
        tiles: rows and columns of them.
    """

    def __init__(self, matrices: Tensor, shape: torch.Size, tiles: tuple[int, int]) -> None:
        self.count, self.outputs, self.inputs = matrices.shape
        if HAS_FAST_MKL:
            self._weight = matrices.transpose(1, 2)
            return
        weight = matrices.view(-1, self.inputs, 1, 1)
        rows = min(shape[0], self.samples(tiles)) * math.prod(tiles)
        size = [1, self.count * self.inputs, rows, 1]
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *_ONE_BY_ONE, self.count, size)

    def samples(self, tiles: tuple[int, int]) -> int:
        """How many make a block."""
        rows = max(ROWS, torch.get_num_threads() * _ENTRIES // (self.count * self.inputs))
        return max(1, rows // math.prod(tiles))

    def times(self, factors: Tensor) -> Tensor:
        """From (products, rows, inputs) to (products, rows, outputs), each with its matrix."""
        if HAS_FAST_MKL:
            return torch.bmm(factors, self._weight)
        rows = factors.shape[1]
        images = factors.transpose(0, 1).view(1, rows, 1, -1).permute(0, 3, 1, 2)
        found: Tensor = torch.ops.mkldnn._convolution_pointwise(
            images, self._weight, None, *_ONE_BY_ONE, self.count, "none", [], ""
        )
        return found.permute(0, 2, 3, 1).reshape(rows, self.count, self.outputs).transpose(0, 1)


def pays(layer: nn.Conv2d, shape: torch.Size) -> bool:
    """Whether this algorithm can compute a layer, and is faster for inputs of this shape."""
    if layer.kernel_size != (3, 3) or layer.dilation != (1, 1) or layer.groups != 1:
        return False
    padding, (stride, other), inputs, outputs = _padding(layer), layer.stride, layer.in_channels, layer.out_channels
    can = stride == other and ((stride == 1 and max(padding) <= 2) or (stride == 2 and padding == (1, 1)))
    if not can or layer.weight.dtype != torch.float32 or inputs * outputs < ENOUGH[stride] * (inputs + outputs):
        return False
    way = _forward(padding, stride)
    tiles = math.prod(way.tiles(_size(shape, padding, stride)))
    most = _MOST // (way.rows.products * way.columns.products * max(inputs, outputs))
    return shape[0] * tiles >= ROWS // 2 and tiles <= most and _products_are_float32()


def _products_are_float32() -> bool:
    """Whether matrix products are in float32 as such; settings that lower them leave PyTorch's convolutions alone."""
    kinds: list[Any] = [getattr(torch.backends.mkldnn, name, None) for name in ("conv", "matmul")]
    if None in kinds:  # PyTorch up to 2.8
        return torch.get_float32_matmul_precision() == "highest"
    return all(kind.fp32_precision in ("none", "ieee") for kind in kinds)


def transform(layer: nn.Conv2d, shape: torch.Size, weight: Tensor) -> Winograd:
    """The weights of a layer as this algorithm wants them."""
    padding, stride = _padding(layer), layer.stride[0]
    way = _forward(padding, stride)
    forward = Products(way.transform(weight), shape, way.tiles(_size(shape, padding, stride)))
    return Winograd(layer.bias, padding, stride, forward)


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    return int(layer.padding[0]), int(layer.padding[1])


def _size(shape: torch.Size, padding: tuple[int, int], stride: int) -> tuple[int, int]:
    """Rows and columns of the output."""
    return (shape[2] + 2 * padding[0] - 3) // stride + 1, (shape[3] + 2 * padding[1] - 3) // stride + 1


def _forward(padding: tuple[int, int], stride: int) -> _Pass:
    return _Pass(FOUR, TWO, padding) if stride == 1 else _Pass(HALVE, HALVE, (1, 1))


def _backward(padding: tuple[int, int], stride: int) -> _Pass:
    return _Pass(FOUR, TWO, (2 - padding[0], 2 - padding[1])) if stride == 1 else _Pass(DOUBLE, DOUBLE, (0, 0))


def _convolve(input: Tensor, weight: Products, bias: Tensor | None, way: _Pass, size: Sequence[int]) -> Tensor:
    """From (N, inputs, rows, columns) to (N, outputs, *size)."""
    tiles = way.tiles(size)
    most, outputs = weight.samples(tiles), weight.outputs
    result = torch.empty(
        (len(input), outputs, *size), dtype=input.dtype, device=input.device, memory_format=torch.channels_last
    )
    ins, outs = (tensor.permute(0, 2, 3, 1).split(most) for tensor in (input, result))
    block = None
    for part, out in zip(ins, outs, strict=True):
        if block is None or len(part) < most:
            block = _Block(part, tiles, way, weight)
        block.convolve(part, out, bias)
    return result


class _Block:
    """Memory for as many samples as stay in the cache from one transform to the next, and views of it.

    Args:
        input: (samples, rows, columns, channels).
        tiles: rows and columns of them.
        way: what is computed.
        weight: what tiles are multiplied with.
    """

    def __init__(self, input: Tensor, tiles: tuple[int, int], way: _Pass, weight: Products) -> None:
        (samples, height, width, inputs), (down, across), (above, left) = input.shape, tiles, way.before
        rows, columns, outputs = way.rows, way.columns, weight.outputs
        self._way, self._weight = way, weight
        self._shape = down, rows.outputs, across, columns.outputs
        reach = columns.reach(across)
        products, places = (rows.products, columns.products), (samples, down, across)
        padded, half, tiled, half_sums = _scratch.take(
            (samples, rows.reach(down), reach, inputs),
            (rows.products, samples, down, reach, inputs),
            (*products, *places, inputs) if HAS_FAST_MKL else (*places, *products, inputs),
            (rows.outputs, columns.products, *places, outputs),
        )
        tiled = tiled if HAS_FAST_MKL else tiled.permute(3, 4, 0, 1, 2, 5)  # as the products read it
        padded.zero_()
        self._inside = padded[:, above : above + height, left : left + width]
        self._rows = [padded[:, k :: rows.step][:, :down] for k in range(rows.window)]
        self._half = half.unbind(0)
        self._columns = [half[:, :, :, k :: columns.step][:, :, :, :across] for k in range(columns.window)]
        self._tiled, self._factors = tiled.unbind(1), tiled.flatten(2, 4).flatten(0, 1)
        self._products = *products, *places, outputs
        self._half_sums, self._to_sum_again = half_sums.unbind(0), half_sums.unbind(1)

    def convolve(self, input: Tensor, output: Tensor, bias: Tensor | None) -> None:
        """From (samples, rows, columns, inputs) to (samples, rows, columns, outputs)."""
        self._inside.copy_(input)
        self._way.rows.spread(self._rows, self._half)
        self._way.columns.spread(self._columns, self._tiled)
        products = self._weight.times(self._factors).view(self._products)
        self._way.rows.sum(products.unbind(0), self._half_sums)
        if bias is not None:
            self._to_sum_again[1].add_(bias)  # it is in all sums below once, with a plus
        down, rows, across, columns = self._shape
        whole = output.shape[1:3] == (down * rows, across * columns)
        target = output if whole else output.new_empty(len(output), down * rows, across * columns, output.shape[3])
        places = target.unflatten(2, (across, columns)).unflatten(1, (down, rows)).permute(2, 4, 0, 1, 3, 5)
        self._way.columns.sum(self._to_sum_again, places.unbind(1))
        if not whole:
            output.copy_(target[:, : output.shape[1], : output.shape[2]])


class _Scratch(threading.local):
    """Memory for one block, kept by each thread: the first touch of new memory costs more than the transforms."""

    memory: Tensor | None = None

    def take(self, *shapes: tuple[int, ...]) -> Iterator[Tensor]:
        """Tensors of these shapes, good until the next call."""
        sizes = list(map(math.prod, shapes))
        if self.memory is None or len(self.memory) < sum(sizes):
            with torch.inference_mode(False):
                self.memory = torch.empty(sum(sizes), dtype=torch.float32, device="cpu")
        parts = self.memory[: sum(sizes)].split(sizes)
        return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


_scratch = _Scratch()
