"""What a copy of a model is made without: its optimizers, and the fast models and attacks that it owns."""

from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer


class LeftOut:
    """Mixin for what belongs to a fast model, and not to the model that may own it."""


TRAINING = (Optimizer, LRScheduler, torch.amp.GradScaler)
"""What trains a model: no part of the function that it computes."""


def is_left_out(value: object) -> bool:
    """Whether a copy is made without this object."""
    return isinstance(value, (LeftOut, *TRAINING))


def is_trainer(value: object) -> bool:
    """Whether this is Lightning's Trainer, to which its modules refer: no part of a model, but code may ask it things.

    It counts steps and holds data loaders: so it is neither copied nor looked at, and copies refer to it too.
    """
    # By name, since importing Lightning is slow. That of the class comes first: every object of a model is asked.
    trainers = [kind for kind in type(value).__mro__ if kind.__name__ == "Trainer"]
    return any(kind.__module__.partition(".")[0] in ("lightning", "pytorch_lightning") for kind in trainers)


def in_place_of(value: object) -> Any:
    """What stands in a copy for an object that is left out: it can be held and not be used."""
    name = type(value).__name__
    return _NoModule(name, value) if isinstance(value, nn.Module) else _Nothing(name)


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(
        f"expected a forward pass that neither trains nor attacks the model, got one that uses {name} of the model's "
        f"own: train and attack from outside of forward()"
    )


class _Nothing:
    """In the place of an object."""

    def __init__(self, name: str) -> None:
        vars(self)["_name"] = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols ask whether there is such a method
            return object.__getattribute__(self, name)
        return _refuse(vars(self)["_name"])

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse(vars(self)["_name"])

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(vars(self)["_name"])

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Nothing":
        return self


class _NoModule(nn.Module):
    """In the place of a module: with parameters of the same names, so that copy and original go side by side."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self._name = name
        self._parameters.update(module._parameters)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Be an error."""
        _refuse(self._name)
