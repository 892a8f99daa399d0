"""A ``foolbox.PyTorchModel`` whose model is a fast one, and what is fast inside of any foolbox model."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import foolbox
import torch
from foolbox.models import Model
from torch import nn

from ..attack import accept_bounds
from ..model import FastAttackModel
from ..modules import same_device
from ..options import FastAttackOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FastPyTorchModel(foolbox.PyTorchModel):
    """A ``foolbox.PyTorchModel`` whose model is a fast one, with bounds, preprocessing and ``transform_bounds``.

    Attacks that minimise a perturbation (every foolbox ``MinimizationAttack``) read decisions off gradient passes.
    With ``decisions="auto"``, the default, those are exact while such an attack runs.

    Args:
        model: a plain ``nn.Module``, or a :class:`~fastadv_adapters.FastAttackModel`.
        bounds: smallest and largest value of an input: two numbers, or foolbox's ``Bounds``.
        device: the model's device, or None for the device that it is on. (``foolbox.PyTorchModel`` moves the model
            it is given; a fast model leaves it where it is.)
        preprocessing: ``dict(mean=..., std=..., axis=..., flip_axis=...)`` as in foolbox.
        **options: as of :class:`~fastadv_adapters.FastAttackModel`.

    Attributes:
        fast: the fast model, with ``update()``, ``summary()`` and ``gradient_stats``.

    Raises:
        TypeError: ``bounds`` are not two numbers, ``model`` is no ``nn.Module``, or an unknown option.
        ValueError: reversed bounds, another device than the model's, options for a model that is fast already.
    """

    def __init__(
        self,
        model: nn.Module,
        bounds: Any,
        device: Any = None,
        preprocessing: Any = None,
        **options: "Unpack[FastAttackOptions]",
    ) -> None:
        bounds = accept_bounds(bounds)
        if isinstance(model, FastAttackModel) and options:
            raise ValueError(
                f"expected no options for a model that is fast already, got {', '.join(options)}: give them to "
                f"FastAttackModel"
            )
        self.fast = model if isinstance(model, FastAttackModel) else FastAttackModel(model, **options)
        if device is not None and not same_device(device, self.fast.device):
            raise ValueError(
                f"expected the model's own device {self.fast.device}, got {device}: move the model first with .to()"
            )
        super().__init__(self.fast, bounds, device=self.fast.device, preprocessing=preprocessing)
        self._model = Caller(self.fast)

    def in_full_precision(self) -> "FastPyTorchModel":
        """The same model with gradients from the full-precision twin."""
        other = copy.copy(self)
        other.fast = self.fast.view(full_precision=True)
        other._model = Caller(other.fast)
        return other


@dataclass
class Caller:
    """What foolbox calls: as its own local function there, but one that can be copied and pickled."""

    fast: FastAttackModel

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs for x, with a graph only if x wants a gradient."""
        with torch.set_grad_enabled(x.requires_grad):
            logits: torch.Tensor = self.fast(x)
        return logits


def in_full_precision(model: Model) -> Model | None:
    """The same foolbox model without half precision, or None if it was never fast."""
    if isinstance(model, FastPyTorchModel):
        return model.in_full_precision()
    inner = getattr(model, "_model", None)
    if isinstance(inner, Caller):
        return around(model, Caller(inner.fast.view(full_precision=True)))
    full = in_full_precision(inner) if isinstance(inner, Model) else None
    return None if full is None else around(model, full)


def around(model: Model, inner: Any) -> Model:
    """A copy of a foolbox model or wrapper, with its bounds, preprocessing and all else, around something else."""
    other = copy.copy(model)
    other._model = inner  # type: ignore[attr-defined]
    return other
