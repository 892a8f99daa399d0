"""What comes in from outside, checked once at the border: models, options, arguments."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .anchor import Anchor
from .classes import has_hooks, inside_of
from .layouts import last_place, pieces
from .leaving_out import LeftOut
from .notices import notify
from .walking import modules_of, named_buffers_of, named_modules_of, named_parameters_of, parameters_of, registered_in

Decisions = Literal["auto", "exact", "fast"]
RunBy = Literal["eager", "compile", "cudagraph"]
EngineName = Literal["auto", RunBy]
DECISIONS: tuple[Decisions, ...] = get_args(Decisions)
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
LOGITS_DTYPES = (torch.float32, torch.float64)
COMMON_ERRORS = (RuntimeError, ValueError, TypeError, IndexError)  # by exact type: these can be told with more words
_SHARDED = ("DTensor", "FSDPModule", "FullyShardedDataParallel")
_IN_FLOAT = ("FloatFunctional", "FXFloatFunctional")  # these stand among PyTorch's quantised modules


def accept_model(model: object) -> nn.Module:
    """The module to wrap, out of any container that only runs it elsewhere or otherwise.

    Raises:
        TypeError: not a module.
        ValueError: a module that cannot be attacked: what :func:`refuse_unfit` finds, NaN weights, already fast.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}: wrap the model itself")
    if any(isinstance(part, LeftOut) and not _is_owned(part, model) for part in modules_of(model)):
        raise ValueError(
            f"expected a plain model, got {type(model).__name__} with a FastAttackModel in it: wrap the whole plain "
            f"model instead, normalisation included"
        )
    if any(isinstance(part, nn.DataParallel) for part in modules_of(model)):
        notify("the fast model runs the module inside nn.DataParallel on one device", "data-parallel")
    while (inside := inside_of(model)) is not None and not has_hooks(model):
        model = inside
    refuse_unfit(model)
    device_of(model)  # raises of several
    scratch = _scratch(model)
    saved = {name: tensor for name, tensor in _tensors(model).items() if name not in scratch}
    refuse_nan({name: tensor for name, tensor in saved.items() if not isinstance(tensor, Anchor)})
    return model


def _scratch(model: nn.Module) -> set[str]:
    """The buffers that no checkpoint holds: memory that a pass writes before it reads it may hold anything."""
    named = ((prefix, part._non_persistent_buffers_set) for prefix, part in named_modules_of(model))
    return {f"{prefix}.{name}" if prefix else name for prefix, names in named for name in names}


def _is_owned(fast: Any, model: nn.Module) -> bool:
    """Whether a fast model inside is one of the model itself, or of a part: it is kept there, to attack with."""
    return any(part is fast.wrapped for part in modules_of(model))


def refuse_unfit(model: nn.Module) -> None:
    """Raise ValueError for a model without parameters, lazy, quantised, sharded, on meta, or in TorchScript.

    Also for weights of a class that does not take what is done with weights.
    """
    tensors = _tensors(model)
    _refuse_sharded(model, tensors)
    _refuse_quantised(model, tensors)
    _refuse_wrappers(tensors)
    if not any(True for _ in parameters_of(model)):
        raise ValueError(
            f"expected a model with parameters, got {type(model).__name__} without any: there is nothing to speed up, "
            f"and no device to run on"
        )
    for name, tensor in tensors.items():
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise ValueError(
                f"expected initialised parameters, got {name}, which is lazy: run the model once on an example batch"
            )
        if tensor.is_meta:
            raise ValueError(f"expected real weights, got {name} on the meta device: load the weights first")
    refuse_freed(model)
    if any(isinstance(part, torch.jit.ScriptModule) for part in modules_of(model)):
        raise ValueError(
            f"expected a model in Python, got {type(model).__name__} with TorchScript in it, whose code can neither be "
            f"folded nor copied around its tensors: wrap the model as it was before torch.jit"
        )


def refuse_freed(model: nn.Module) -> None:
    """Raise ValueError for weights whose memory was given back: reading it would end the process."""
    for name, tensor in _tensors(model).items():
        if tensor.layout is torch.strided and tensor.numel() and not tensor.is_meta and _is_freed(tensor):
            raise ValueError(
                f"expected weights in memory, got {name}, whose storage is too small for it: load the weights back "
                f"(from where they were offloaded to) before the fast model is called"
            )


def _is_freed(tensor: Tensor) -> bool:
    holds_others: Callable[[Any], bool] = is_traceable_wrapper_subclass
    if holds_others(tensor):
        return False
    needed = (tensor.storage_offset() + last_place(tensor) + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() < needed


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(named_parameters_of(model)), **dict(named_buffers_of(model))}


def _refuse_sharded(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    kinds = [*map(type, tensors.values()), *map(type, modules_of(model))]
    ancestors = [k for kind in kinds for k in kind.__mro__ if k.__module__.startswith("torch.distributed.")]
    if found := [k.__name__ for k in ancestors if k.__name__ in _SHARDED]:
        raise ValueError(
            f"expected a model with whole weights on this rank, got {type(model).__name__} with a {found[0]}, of which "
            f"each rank holds a part: an attack would wait for the other ranks in every step. Keep a plain copy of the "
            f"model on each rank, wrap that, and load into it after training steps what "
            f"torch.distributed.checkpoint.state_dict.get_model_state_dict gathers with full_state_dict=True"
        )


def _refuse_quantised(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    found = [name for name, tensor in tensors.items() if tensor.is_quantized]
    parts = [(name, type(part)) for name, part in named_modules_of(model) if type(part).__name__ not in _IN_FLOAT]
    found += [name or kind.__name__ for name, kind in parts if _is_quantised(kind.__module__)]
    if found:
        raise ValueError(
            f"expected a floating-point model, got quantised {found[0]}: integers have no gradient; wrap the "
            f"model as it was before quantisation"
        )


def _refuse_wrappers(tensors: dict[str, Tensor]) -> None:
    """Those that hold others, as quantised weights do, know the operators that their class has written down."""
    holds_others: Callable[[Any], bool] = is_traceable_wrapper_subclass
    for name, tensor in filter(lambda pair: holds_others(pair[1]), tensors.items()):
        try:
            with torch.no_grad():
                torch.isnan(tensor.detach().clone().copy_(tensor).reshape(-1)[:1]).any()
        except Exception as error:
            kind = type(tensor).__name__
            raise ValueError(
                f"expected plain tensors as weights, got {name} of class {kind}, which cannot be copied, written into "
                f"and read: put plain ones in their place (dequantise them), or wrap the model as it was before"
            ) from error


def _is_quantised(module: str) -> bool:
    names = module.split(".")
    return names[0] in ("torch", "torchao") and "quantized" in names


def device_of(module: nn.Module) -> torch.device:
    """The one device of a module's parameters and buffers.

    Raises:
        ValueError: they are on several devices.
    """
    tensors = registered_in(module)
    devices = {t.device for t in tensors if not isinstance(t, Anchor)}  # that of a fast model of its own follows later
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "none at all"
        raise ValueError(
            f"expected all parameters and buffers of the model on one device, got {found}. Move the model with .to()"
        )
    return devices.pop()


def refuse_nan(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError if a tensor holds NaN; reads the device once."""
    floating = {name: t for name, t in tensors.items() if t.is_floating_point()}
    if not floating:
        return
    flags = torch.stack([torch.isnan(pieces(t.detach())[-1]).any() for t in floating.values()])
    if bool(flags.any()):
        names = [name for name, flag in zip(floating, flags.tolist(), strict=True) if flag]
        raise ValueError(
            f"expected weights without NaN, got NaN in {names[0]}"
            + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            + ": load a checkpoint from before the training diverged"
        )


def accept_engine(engine: object) -> None:
    """Raise ValueError for an engine that does not exist."""
    if engine not in ENGINES:
        raise ValueError(f"expected engine to be one of {', '.join(map(repr, ENGINES))}, got {engine!r}")


def accept_flag(name: str, flag: Any) -> bool:
    """A setting that is on or off; a ValueError if it is anything else, as the text "False" is, which counts as on."""
    if not isinstance(flag, bool):
        raise ValueError(f"expected {name} to be True or False, got {flag!r}")
    return flag


def accept_options(decisions: object, logits_dtype: object, loss_scale: object, **flags: object) -> None:
    """Raise ValueError for an option that does not exist, or a flag that is not True or False."""
    for name, flag in flags.items():
        accept_flag(name, flag)
    if decisions not in DECISIONS:
        raise ValueError(f"expected decisions to be one of {', '.join(map(repr, DECISIONS))}, got {decisions!r}")
    if logits_dtype not in LOGITS_DTYPES:
        raise ValueError(f"expected logits_dtype to be torch.float32 or torch.float64, got {logits_dtype!r}")
    number = isinstance(loss_scale, (int, float)) and not isinstance(loss_scale, bool) and 0 < loss_scale < float("inf")
    if not number and loss_scale not in ("per-sample", "per-call", None):
        raise ValueError(
            f'expected loss_scale to be "per-sample", "per-call", a positive number or None, got {loss_scale!r}'
        )


def accept_tensors(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Raise TypeError or ValueError for arguments that the model cannot be attacked with."""
    floating = [t for t in tensors if t.is_floating_point()]
    if not floating and (not tensors or torch.is_grad_enabled()):  # without gradients nobody can mean to attack
        got = f"{tensors[0].dtype}: convert it with .float()" if tensors else "no tensor: make one by torch.from_numpy"
        raise TypeError(f"expected an input that is a floating-point tensor, got {got}")
    if not any(t.ndim for t in floating or tensors):
        raise ValueError("expected an input with a batch dimension, got a 0-d tensor: add one with [None]")
    for tensor in tensors:
        if tensor.device != device and tensor.ndim:
            raise ValueError(
                f"expected inputs on the model's device {device}, got one on {tensor.device}: move it with .to()"
            )


def number_of_samples(tensors: Sequence[Tensor]) -> int:
    """How many samples a call has: the length of its first floating input, for others may be no rows of samples."""
    rows = [t for t in tensors if t.ndim]
    return len(next((t for t in rows if t.is_floating_point()), rows[0]))


def shapes(tensors: Sequence[Tensor]) -> str:
    """The inputs in words, for the model's own errors."""
    return ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors)


def first_line(error: BaseException) -> str:
    """An error as notes tell it: its type and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is one of memory, on any device, and so says nothing of the model that raised it."""
    texts = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    found = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return found or isinstance(error, MemoryError)
