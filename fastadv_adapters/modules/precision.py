"""Which dtype and memory format on which device, and which weights are cast to it ahead of time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .checkpoints import without_reentrant_checkpoints
from .processor import HAS_AMX, HAS_AVX512_BF16
from .walking import modules_of, parameters_of

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Layers that autocast runs in half precision, by exact type: a subclass may use its weight in its own way.
MATRIX_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_CAST_AHEAD: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    **dict.fromkeys(MATRIX_LAYERS, ("weight", "bias")),
}


def own_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's floating-point weights, which it takes its inputs in; None if they have several."""
    dtypes = {p.dtype for p in parameters_of(module) if p.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def widen(value: Any) -> Any:
    """A tensor in half precision as one in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def widened(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same network in float32 or float64, tensors in attributes included, as a fast network has them."""
    network = network.double() if dtype == torch.float64 else network.float()
    for part in modules_of(network):
        held = {name: tensor for name, tensor in vars(part).items() if isinstance(tensor, Tensor)}
        vars(part).update({name: t.to(dtype) for name, t in held.items() if t.is_floating_point()})
    return network


@dataclass(frozen=True)
class Precision:
    """How the fast network computes.

    Attributes:
        device: where the wrapped model lives.
        dtype: what matrix products and convolutions run in. In a half precision everything else stays in float32,
            as under ``torch.autocast``.
        channels_last: whether 4-d and 5-d tensors are laid out channels-last.
    """

    device: torch.device
    dtype: torch.dtype
    channels_last: bool

    @property
    def half(self) -> bool:
        """Whether part of the network runs in 16 bits."""
        return self.dtype in HALF

    @property
    def base(self) -> torch.dtype:
        """The dtype of everything that autocast does not lower, inputs included."""
        return torch.float32 if self.half else self.dtype

    def context(self) -> AbstractContextManager[None]:
        """Autocast as the fast network needs it; an autocast region of the caller's is switched off or replaced."""
        device, dtype = self.device.type, self.dtype if self.half else None
        caches = bool(getattr(parametrize, "_cache_enabled", 0))
        if dtype is None and not caches and not torch.is_autocast_enabled(device):
            return without_reentrant_checkpoints()
        return _lowered(device, dtype, caches=caches)

    def dtype_for(self, tensor: Tensor, *, cast_ahead: bool = False) -> torch.dtype:
        """The dtype in which the fast network keeps a tensor of the wrapped model."""
        if not tensor.is_floating_point():
            return tensor.dtype
        return self.dtype if cast_ahead else self.base

    def memory_format(self, ndim: int, *, spatial: bool = True) -> torch.memory_format:
        """The memory format for a tensor with ``ndim`` dimensions; ``spatial`` says whether it is an image."""
        if self.channels_last and spatial:
            return {4: torch.channels_last, 5: torch.channels_last_3d}.get(ndim, torch.contiguous_format)
        return torch.contiguous_format

    def enter(self, tensor: Tensor) -> Tensor:
        """An input as the fast network wants it: base dtype, memory format."""
        if not tensor.is_floating_point():
            return tensor
        if not self.channels_last:
            return tensor.to(self.base)
        return tensor.to(self.base).contiguous(memory_format=self.memory_format(tensor.ndim))


@contextmanager
def _lowered(device: str, dtype: torch.dtype | None, *, caches: bool) -> Iterator[None]:
    with _set_autocast(device, dtype), without_reentrant_checkpoints(), _own_cache() if caches else nullcontext():
        yield


@contextmanager
def _own_cache() -> Iterator[None]:
    """The cache of ``parametrize.cached()`` for one run alone: it takes a model and its copies for one."""
    before, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = before


def autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Autocast to ``dtype`` inside, or none at all: what ``torch.autocast`` does, in a fraction of its time.

    Its cache is off: it holds casts of leaves that require a gradient, and here no weight does.
    """
    return nullcontext() if dtype is None and not torch.is_autocast_enabled(device) else _set_autocast(device, dtype)


@contextmanager
def _set_autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    enabled = torch.is_autocast_enabled(device)
    before, cache = torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
    try:
        if dtype is not None:
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_enabled(device, dtype is not None)
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, before)
        torch.set_autocast_cache_enabled(cache)


@contextmanager
def ieee_float32(device: torch.device) -> Iterator[None]:
    """float32 products as such inside, without TF32, whose rounding is that of half precision; on CUDA alone."""
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    # From PyTorch 2.9 on each kind of operator has a setting; reading the old one fails where they differ.
    settings = [s for s in (getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None), matmul) if s is not None]
    name, ieee = ("fp32_precision", "ieee") if hasattr(cudnn, "conv") else ("allow_tf32", False)
    settings = settings if name == "fp32_precision" else [cudnn, matmul]
    before = [getattr(setting, name) for setting in settings]
    try:
        for setting in settings:
            setattr(setting, name, ieee)
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setattr(setting, name, value)


def resolve(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    channels_last: bool | Literal["auto"],
) -> Precision:
    """Turn the user's options into a :class:`Precision`; raises ValueError for an unknown option."""
    accept_precision(dtype, channels_last)
    if channels_last == "auto":
        channels_last = device.type in ("cpu", "cuda") and has_images(module)
    return Precision(device, auto_dtype(device) if dtype == "auto" else dtype, bool(channels_last))


def accept_precision(dtype: object, channels_last: object) -> None:
    """Raise ValueError for a dtype or a layout that no fast network has."""
    if dtype != "auto" and dtype not in DTYPES:
        choices = ", ".join(str(d) for d in DTYPES)
        named = ": pass the dtype, not its name" if isinstance(dtype, str) else ""
        raise ValueError(f'expected dtype to be "auto" or one of {choices}, got {dtype!r}{named}')
    if not isinstance(channels_last, bool) and channels_last != "auto":
        raise ValueError(f'expected channels_last to be True, False or "auto", got {channels_last!r}')


def has_images(module: nn.Module) -> bool:
    """Whether the module holds a convolution in two or three dimensions."""
    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return any(isinstance(m, kinds) for m in modules_of(module))


def auto_dtype(device: torch.device) -> torch.dtype:
    """The fastest dtype that the device computes in hardware."""
    return next((dtype for dtype in HALF if is_in_hardware(dtype, device)), torch.float32)


def is_in_hardware(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has products in this half precision: on CUDA tensor cores, on a CPU AVX512 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= (7 if dtype == torch.float16 else 8)
    return device.type == "cpu" and dtype == torch.bfloat16 and _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    return HAS_AVX512_BF16 or HAS_AMX


def cast_ahead_names(module: nn.Module) -> tuple[str, ...]:
    """Which parameters of this one module autocast would cast in every forward, so that they are cast once instead."""
    return _CAST_AHEAD.get(type(module), ())


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64."""
    return device.type != "mps"


def widest_on(device: torch.device) -> torch.dtype:
    """Float64, or float32 if the device has no wider dtype."""
    return torch.float64 if has_float64(device) else torch.float32
