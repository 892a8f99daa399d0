"""What becomes of the parts of a copied network: mixins for layers and batch norms whose class is changed in place."""

import math
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import become
from .following import ScaleAndShift
from .own_forward import ARGUMENTS


class Balance(threading.local):
    """How often a folded layer was called more than its batch norm, in this thread's present run.

    Infinitely often if what it was called with is such that the batch norm does not fold. Of a part of a stream: how
    often that was called.
    """

    more: float = 0


class Skipped:
    """Mixin for a batch norm that is now part of the layer before it."""

    balance: Balance

    def forward(self, input: Tensor) -> Tensor:
        """Hand the input on."""
        self.balance.more -= 1
        return input


class Joined:
    """Mixin for a layer that a batch norm was folded into."""

    balance: Balance
    weight: Tensor

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, and count."""
        # On a sequence, or without a batch, a batch norm normalises another dimension than that of the outputs.
        self.balance.more += 1 if input.ndim == self.weight.ndim else math.inf
        return super().forward(input, *args, **kwargs)  # type: ignore[misc]


class _Counted:
    """Mixin for a layer or a batch norm of a centred stream, all of which are called equally often."""

    balance: Balance

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, and count."""
        self.balance.more += 1
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class Affine:
    """Mixin for a batch norm frozen into ``input * scale + shift``, in the dtype of its input."""

    scale_and_shift: ScaleAndShift

    def forward(self, input: Tensor) -> Tensor:
        """Scale and shift."""
        return _scaled_and_shifted(input, self.scale_and_shift)


class OwnCode:
    """Mixin for a batch norm subclass that runs its own code, in which its batch norm is left out or frozen.

    Attributes:
        balance: of the layer that the batch norm is folded into.
        scale_and_shift: of the batch norm if it is frozen; None if it is folded.
    """

    balance: Balance
    scale_and_shift: ScaleAndShift | None

    def in_place_of_norm(self, input: Tensor) -> Tensor:
        """What its own code gets from ``torch.nn.functional.batch_norm``."""
        if self.scale_and_shift is not None:
            return _scaled_and_shifted(input, self.scale_and_shift)
        self.balance.more -= 1
        return input


class Marked(Tensor):
    """The running mean of such a batch norm, which tells a call of ``torch.nn.functional.batch_norm`` whose it is."""

    owner: weakref.ref[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do without the batch norm; all else is done as on any other tensor."""
        named = kwargs or {}
        if func is F.batch_norm:
            mean = args[1] if len(args) > 1 else named["running_mean"]
            norm = mean.owner() if type(mean) is Marked else None
            if norm is not None:
                named, args = dict(zip(ARGUMENTS, args, strict=False)) | named, ()
                if _is_own(norm, named):
                    return norm.in_place_of_norm(named["input"])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **named)


def mark(norm: OwnCode, mean: Tensor) -> Tensor:
    """The running mean of a norm, in the same memory, marked as its own."""
    marked = mean.as_subclass(Marked)
    marked.owner = weakref.ref(norm)
    return marked


def _is_own(norm: Any, named: dict[str, Any]) -> bool:
    """Whether this is the batch norm that was taken out: with the norm's own tensors, in eval mode."""
    tensors = {**norm._parameters, **norm._buffers}
    owned = ((name, tensors[name] if name in tensors else getattr(norm, name)) for name in ARGUMENTS[1:5])
    own = all(named.get(name) is tensor for name, tensor in owned)
    return own and not named.get("training") and named.get("eps", 1e-5) == norm.eps


def _scaled_and_shifted(input: Tensor, own: ScaleAndShift) -> Tensor:
    # Another dtype comes out of an autocast region of the model's own.
    scale, shift = own[input.dtype] if input.dtype in own else next(iter(own.values())).to(input.dtype)
    shape = (-1,) + (1,) * (input.ndim - 2)
    return torch.addcmul(shift.view(shape), input, scale.view(shape))


def swap(part: nn.Module, affine: ScaleAndShift | None, *, has_own_code: bool) -> None:
    """Give a batch norm the class that does what is left of it."""
    if not has_own_code:
        become(part, Skipped if affine is None else Affine)
    else:
        become(part, OwnCode)
    if has_own_code or affine is not None:
        vars(part)["scale_and_shift"] = affine


def count(part: nn.Module) -> Balance:
    """Count the calls of a part of a stream."""
    become(part, _Counted)
    balance = vars(part)["balance"] = Balance()
    return balance
