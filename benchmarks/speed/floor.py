"""The floor: how fast the device could be, from the work that an attack must do and the rates that are measured."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastadv_adapters.comparison import Timing, Way

PRODUCTS = ("convolution", "cudnn_convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
"""Operators that run on matrix units. Attention, whose names differ between devices, counts too."""


@dataclass(frozen=True)
class Work:
    """What one step of an attack on a batch must do: a forward pass and a gradient with respect to the input.

    Attributes:
        flops: floating-point operations.
        elements: entries of the tensors that convolutions, matrix products and attention read and write. All that
            stands between them could be computed on the way, and is not counted.
    """

    flops: int
    elements: int

    def seconds(self, flops_per_s: float, bytes_per_s: float, dtype: torch.dtype) -> tuple[float, float]:
        """The least seconds by operations and by bytes; the larger is the floor."""
        return self.flops / flops_per_s, self.elements * dtype.itemsize / bytes_per_s


def work_of(model: nn.Module, x: Tensor) -> Work:
    """Count on the plain eval-mode network with frozen weights: what the attack needs, not what a way happens to do.

    The network is left as found.
    """
    with _frozen(model):
        # Attention is a fused operator that the counter does not know on every device.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            _gradient(model, x)
        with _ElementCounter() as elements:
            _gradient(model, x)
    return Work(int(counter.get_total_flops()), elements.count)


def _gradient(model: nn.Module, x: Tensor) -> None:
    leaf = x.detach().clone().requires_grad_()
    model(leaf).sum().backward()  # the counter of operations does not take autograd.grad


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The model frozen and in eval mode, for a while."""
    states = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.requires_grad_(False).eval()
        yield
    finally:
        for parameter, state in states:
            parameter.requires_grad_(state)
        for module, mode in modes:
            module.training = mode


class _ElementCounter(TorchDispatchMode):
    """Adds up the entries that matrix operators read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS or "scaled_dot_product" in name:
            read = [args[0], args[2]] if name == "convolution_backward" else args  # the input is for weight gradients
            written = out if isinstance(out, (tuple, list)) else [out]
            self.count += sum(t.numel() for t in (*read, *written) if isinstance(t, Tensor))
        return out


_IMAGES = 4  # of the convolution that stands for a matrix product


def _times(device: torch.device) -> int:
    """How often a yardstick is repeated within a measurement: on a GPU once would be over in a millisecond."""
    return 10 if device.type == "cuda" else 1


def matrix_product(device: torch.device, dtype: torch.dtype, *, size: int) -> tuple[Way, float]:
    """Square matrix products as a way to be measured in turn with others, and their floating-point operations.

    Their speed is the peak that is reported: what the device reaches in practice, under the same clock and the same
    load, for work without any overhead. On a processor they are 1x1 convolutions, which are oneDNN's: PyTorch's matrix
    product in float32 is MKL's, of half the speed on processors that are not Intel's.
    """
    if device.type == "cpu":
        side = max(1, round(math.sqrt(size / _IMAGES)))
        images = torch.randn(_IMAGES, size, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(size, size, 1, 1, dtype=dtype).contiguous(memory_format=torch.channels_last)
        return Way(lambda: F.conv2d(images, weight)), 2.0 * _IMAGES * side**2 * size**2
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    return Way(lambda: _multiply_on_cuda(left, right, out)), 2.0 * size**3 * _times(device)


def _multiply_on_cuda(left: Tensor, right: Tensor, out: Tensor) -> None:
    """In float32 with TF32 if convolutions may, which is PyTorch's default for these alone: one peak for all layers."""
    settings = torch.backends.cuda.matmul
    before, settings.allow_tf32 = settings.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for _ in range(_times(left.device)):
            torch.mm(left, right, out=out)
    finally:
        settings.allow_tf32 = before


def device_copy(device: torch.device, *, mebibytes: int) -> tuple[Way, float]:
    """Large copies from one place of the device's memory to another, and the bytes that they read and write."""
    source = torch.rand(mebibytes * 2**18, device=device)  # float32: 2^18 entries a mebibyte
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(_times(device)):
            target.copy_(source)

    return Way(copy), 2.0 * source.nbytes * _times(device)


@dataclass(frozen=True)
class Rates:
    """Measured rates of the device: operations per second by dtype, bytes per second."""

    flops_per_s: dict[torch.dtype, float]
    bytes_per_s: float

    def floor(self, work: Work, dtype: torch.dtype) -> float:
        """The least seconds of this work in this dtype."""
        return max(work.seconds(self.flops_per_s[dtype], self.bytes_per_s, dtype))


class Yardsticks:
    """Matrix products and a copy, to be measured in turn with what they are to be compared with.

    Args:
        device: where.
        dtypes: of the matrix products.
        matrix_size: rows and columns of the matrices.
        mebibytes: size of what is copied.
    """

    def __init__(
        self, device: torch.device, dtypes: tuple[torch.dtype, ...], *, matrix_size: int, mebibytes: int
    ) -> None:
        self.ways: dict[str, Way] = {}
        self._amounts: dict[str, float] = {}
        self._dtypes = dtypes
        for dtype in dtypes:
            self._add(_name(dtype), matrix_product(device, dtype, size=matrix_size))
        self._add("copy", device_copy(device, mebibytes=mebibytes))

    def _add(self, name: str, yardstick: tuple[Way, float]) -> None:
        self.ways[name], self._amounts[name] = yardstick

    def rates(self, timings: dict[str, Timing]) -> Rates:
        """The rates, from the timings of `ways`, which are taken out of `timings`."""
        found = {name: self._amounts[name] / timings.pop(name).median for name in self.ways}
        return Rates({dtype: found[_name(dtype)] for dtype in self._dtypes}, found["copy"])


def _name(dtype: torch.dtype) -> str:
    return f"matrix product, {dtype}"
