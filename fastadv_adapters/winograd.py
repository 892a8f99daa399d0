"""3 x 3 convolutions in float32 on a processor with a third of the multiplications.

Winograd's minimal filtering (Lavin and Gray 2016, https://arxiv.org/abs/1509.09308, section 4.1): along one dimension,
n outputs of a kernel g over n + 2 inputs d are  A'[(G g) * (B' d)],  with n + 2 multiplications for 3 n; in two
dimensions both are transformed along each. Summed over channels, the product in the middle is one matrix product for
each of its entries. The transforms around it only scale and add, and that of the weights is done once per update.

Here tiles have 4 rows and 2 columns of outputs: 24 multiplications for 72. How much that rounds depends on the points
at which the polynomials behind the algorithm are taken (Barabasz et al. 2018, https://arxiv.org/abs/1803.10986). With
those below the error is that of PyTorch's own convolution, whose sums have 9 times as many terms.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ENOUGH = 80.0
"""From here on the multiplications that are spared cost more than the transforms: inputs * outputs / (inputs + outputs)
of a layer, in channels."""

ROWS = 128
"""Matrix products with fewer rows are bound by reading the weights."""

DOWN, ACROSS = 4, 2
"""Rows and columns of outputs in a tile."""

# Four outputs: points 0, A, -A, B, -B and infinity; of the pairs of sixteenths these round least. All constants that
# the transforms multiply with are exact in float32.
_A, _B = 5 / 8, 3 / 2
_AA, _BB = _A * _A, _B * _B
_G_DOWN = [
    [1 / (_AA * _BB), 0.0, 0.0],
    *([1 / (2 * _AA * (_AA - _BB)), p / (2 * _AA * (_AA - _BB)), _AA / (2 * _AA * (_AA - _BB))] for p in (_A, -_A)),
    *([1 / (2 * _BB * (_BB - _AA)), p / (2 * _BB * (_BB - _AA)), _BB / (2 * _BB * (_BB - _AA))] for p in (_B, -_B)),
    [0.0, 0.0, 1.0],
]
# Two outputs: points 0, 1, -1 and infinity.
_G_ACROSS = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]]

_ENTRIES = 2**18  # of transformed tiles per thread: they stay in its cache until they are multiplied


@dataclass
class Winograd:
    """The transformed weights of one layer, for all shapes of input.

    Attributes:
        bias: of the layer.
        padding: of the layer, rows and columns.
        forward: weights for the forward pass, (24, inputs, outputs).
        backward: those for the backward pass, (24, outputs, inputs), once there has been one.
    """

    bias: Tensor | None
    padding: tuple[int, int]
    forward: Tensor
    backward: Tensor | None = None

    def convolve(self, input: Tensor) -> Tensor:
        """The layer's output."""
        return _convolve(input, self.forward, self.bias, self.padding)

    def gradient(self, grad: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
        """The gradient at an input of this shape from that at the output; not itself differentiable."""
        if self.backward is None:
            # It is the convolution of that at the output with the kernel turned round, from outputs to inputs.
            self.backward = _transform(weight, turned=True)
        return _convolve(grad, self.backward, None, (2 - self.padding[0], 2 - self.padding[1]))


def pays(layer: nn.Conv2d, shape: torch.Size) -> bool:
    """Whether this algorithm can compute a layer, and is faster for inputs of this shape."""
    geometry = layer.kernel_size, layer.stride, layer.dilation, layer.groups
    padding, inputs, outputs = _padding(layer), layer.in_channels, layer.out_channels
    if geometry != ((3, 3), (1, 1), (1, 1), 1) or max(padding) > 2 or layer.weight.dtype != torch.float32:
        return False
    rows = shape[0] * math.prod(_tiles(shape, padding))
    return rows >= ROWS // 2 and inputs * outputs >= ENOUGH * (inputs + outputs)


def transform(layer: nn.Conv2d, shape: torch.Size, weight: Tensor) -> Winograd:
    """The weights of a layer as this algorithm wants them."""
    return Winograd(layer.bias, _padding(layer), _transform(weight.transpose(0, 1), turned=False))


def _transform(kernels: Tensor, *, turned: bool) -> Tensor:
    """G g G' of kernels (from, to, 3, 3), which may be turned round before: (24, from, to)."""
    down, across = kernels.new_tensor(_G_DOWN), kernels.new_tensor(_G_ACROSS)
    both = torch.einsum("ai,bj->abij", down, across).reshape(24, 9)
    columns = kernels.contiguous().view(-1, 9).t()
    return ((both.flip(1) if turned else both) @ columns).view(24, *kernels.shape[:2])


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    return int(layer.padding[0]), int(layer.padding[1])


def _size(shape: torch.Size, padding: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the output."""
    return shape[2] + 2 * padding[0] - 2, shape[3] + 2 * padding[1] - 2


def _tiles(shape: torch.Size, padding: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles that cover the output."""
    height, width = _size(shape, padding)
    return math.ceil(height / DOWN), math.ceil(width / ACROSS)


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
    tiles, (_, inputs, outputs) = _tiles(input.shape, padding), weight.shape
    rows = max(ROWS, torch.get_num_threads() * _ENTRIES // (len(weight) * inputs))
    samples, most = len(input), max(1, rows // math.prod(tiles))
    shape = samples, outputs, *_size(input.shape, padding)
    result = torch.empty(shape, dtype=input.dtype, memory_format=torch.channels_last)
    ins, outs = (tensor.permute(0, 2, 3, 1).split(most) for tensor in (input, result))
    block = None
    for part, out in zip(ins, outs, strict=True):
        if block is None or len(part) < most:
            block = _Block(part, tiles, padding, weight)
        block.convolve(part, out, bias)
    return result


class _Block:
    """Memory for as many samples as stay in the cache from one transform to the next, and views of it.

    Args:
        input: (samples, rows, columns, channels).
        tiles: rows and columns of them.
        padding: of the input.
        weight: (24, inputs, outputs).
    """

    def __init__(self, input: Tensor, tiles: tuple[int, int], padding: tuple[int, int], weight: Tensor) -> None:
        (samples, height, width, inputs), (down, across), (above, left) = input.shape, tiles, padding
        self._shape, self._weight = (down, DOWN, across, ACROSS), weight
        columns, outputs = ACROSS * across + 2, weight.shape[2]
        padded, half, tiled, product, half_sums = _scratch.take(
            (samples, DOWN * down + 2, columns, inputs),
            (6, samples, down, columns, inputs),
            (6, 4, samples, down, across, inputs),
            (6, 4, samples, down, across, outputs),
            (4, 4, samples, down, across, outputs),
        )
        padded.zero_()
        self._inside = padded[:, above : above + height, left : left + width]
        self._rows = [padded[:, k::DOWN][:, :down] for k in range(6)]
        self._half = half.unbind(0)
        self._columns = [half[:, :, :, k::ACROSS][:, :, :, :across] for k in range(4)]
        self._tiled = tiled.unbind(1)
        self._factor, self._product = tiled.view(24, -1, inputs), product.view(24, -1, outputs)
        self._to_sum, self._half_sums, self._to_sum_again = product.unbind(0), half_sums.unbind(0), half_sums.unbind(1)

    def convolve(self, input: Tensor, output: Tensor, bias: Tensor | None) -> None:
        """From (samples, rows, columns, inputs) to (samples, rows, columns, outputs)."""
        self._inside.copy_(input)
        _spread_six(self._rows, self._half)
        _spread_four(self._columns, self._tiled)
        torch.bmm(self._factor, self._weight, out=self._product)
        _sum_six(self._to_sum, self._half_sums)
        if bias is not None:
            self._to_sum_again[1].add_(bias)  # it is in both sums below, with a plus
        down, _, across, _ = self._shape
        whole = output.shape[1:3] == (DOWN * down, ACROSS * across)
        target = output if whole else output.new_empty(len(output), DOWN * down, ACROSS * across, output.shape[3])
        places = target.unflatten(2, (across, ACROSS)).unflatten(1, (down, DOWN)).permute(2, 4, 0, 1, 3, 5)
        _sum_four(self._to_sum_again, places.unbind(1))
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
                self.memory = torch.empty(sum(sizes), dtype=torch.float32)
        parts = self.memory[: sum(sizes)].split(sizes)
        return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


_scratch = _Scratch()


def _spread_six(d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """B' for four outputs."""
    for point, other, plus, minus in ((_A, _BB, 1, 2), (_B, _AA, 3, 4)):
        torch.sub(d[3], d[1], alpha=other, out=out[0])
        torch.sub(d[4], d[2], alpha=other, out=out[plus])
        torch.sub(out[plus], out[0], alpha=point, out=out[minus])
        out[plus].add_(out[0], alpha=point)
    torch.add(d[4], d[0], alpha=_AA * _BB, out=out[0]).sub_(d[2], alpha=_AA + _BB)
    torch.add(d[5], d[1], alpha=_AA * _BB, out=out[5]).sub_(d[3], alpha=_AA + _BB)


def _spread_four(d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """B' for two outputs."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _sum_six(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """A' for four outputs; overwrites ``m``."""
    torch.add(m[1], m[2], out=out[0])
    torch.add(m[3], m[4], out=out[2])
    odd, other_odd = m[1].sub_(m[2]), m[3].sub_(m[4])
    torch.mul(odd, _A, out=out[1]).add_(other_odd, alpha=_B)
    torch.add(m[5], odd, alpha=_A * _AA, out=out[3]).add_(other_odd, alpha=_B * _BB)
    torch.mul(out[0], _AA, out=m[2]).add_(out[2], alpha=_BB)
    out[0].add_(out[2]).add_(m[0])
    out[2].copy_(m[2])


def _sum_four(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """A' for two outputs."""
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])
