"""Whether a network's forward pass does nothing but work on the device, which a recording alone repeats."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import (
    are_equal,
    has_hooks,
    host_state,
    is_data,
    is_trainer,
    modules_of,
    named_modules_of,
    registered_in,
    tensors_in_containers,
)


class CannotRecordError(RuntimeError):
    """The forward pass does something that a recording would not repeat."""


@contextmanager
def refuse_what_changes(network: nn.Module) -> Iterator[None]:
    """Run the network inside; raises CannotRecordError for what a recording would not do again.

    That is: running hooks, setting attributes, drawing numbers on the host, and asking a trainer, which counts on.

    Tensors may be written to in place: that is recorded.
    """
    hooked = [name for name, part in named_modules_of(network) if has_hooks(part)]
    if hooked:
        raise CannotRecordError(f"{hooked[0] or 'it'} has hooks, which a recording does not call")
    attributes, drawn = frozen_attributes(network), host_state()
    with _trainers_watched(network) as watched:
        yield
    if any(trainer.asked for trainer in watched):
        raise CannotRecordError("its forward pass asks the trainer, whose answers change")
    for name, now in frozen_attributes(network).items():
        if not are_equal(now, attributes.get(name, {})):
            raise CannotRecordError(f"the forward pass of {name or 'the model'} sets attributes")
    if host_state() != drawn:
        raise CannotRecordError("its forward pass draws random numbers outside of the device")


class _Watched:
    """In the place of a trainer: notes whether it is asked for anything."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.asked = trainer, False

    def __getattr__(self, name: str) -> Any:
        self.asked = True
        return getattr(vars(self)["trainer"], name)


@contextmanager
def _trainers_watched(network: nn.Module) -> Iterator[list[_Watched]]:
    """Trainers in attributes are watched inside."""
    found = [(vars(p), k, _Watched(v)) for p in modules_of(network) for k, v in vars(p).items() if is_trainer(v)]
    try:
        for attributes, name, watched in found:
            attributes[name] = watched
        yield [watched for _, _, watched in found]
    finally:
        for attributes, name, watched in found:
            attributes[name] = watched.trainer


@contextmanager
def memory_kept(network: nn.Module) -> Iterator[None]:
    """All tensors of the network as before afterwards: for passes that only warm up or record."""
    dicts = [held for part in modules_of(network) for held in (vars(part), part._buffers, part._parameters)]
    before = [dict(attributes) for attributes in dicts]
    held = [t for attributes in before for t in attributes.values() if isinstance(t, Tensor)]
    held += tensors_in_containers(network)
    tensors = [(t, t._version, t.clone()) for t in held]
    try:
        yield
    finally:
        for attributes, old in zip(dicts, before, strict=True):
            for name in attributes.keys() - old.keys():
                del attributes[name]
            attributes.update(old)
        with torch.no_grad():
            for tensor, version, value in tensors:
                # What nobody has written to may be the wrapped model's. Running statistics move without a version.
                if tensor._version != version or not _same_values(tensor, value):
                    tensor.copy_(value)


def _same_values(tensor: Tensor, before: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_meta:
        return True
    return torch.equal(tensor, before) or bool(torch.isclose(tensor, before, rtol=0, atol=0, equal_nan=True).all())


def addresses(network: nn.Module, device: torch.device) -> list[Any]:
    """Where the network's tensors lie; a recording is of use as long as this stays the same.

    A number that lies elsewhere than on ``device`` is recorded with its value, so its version counts too.
    """
    found = list(registered_in(network))
    found += [t for part in modules_of(network) for t in vars(part).values() if isinstance(t, Tensor)]
    found += tensors_in_containers(network)  # tables that an update throws away, say
    return [_address(t) if t.device == device else (_address(t), t._version) for t in found]


def _address(tensor: Tensor) -> int:
    """Where it lies; a sparse tensor has several places, of which none is asked for."""
    return tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)


def frozen_attributes(network: nn.Module) -> dict[str, dict[str, Any]]:
    """For each part: tensors by identity, containers and data objects by their contents, all else by itself."""
    return {name: {k: _fixed(v) for k, v in vars(part).items()} for name, part in named_modules_of(network)}


def _fixed(value: Any, depth: int = 8) -> Any:
    if isinstance(value, (Tensor, nn.Module)) or depth == 0:
        return id(value)
    if isinstance(value, dict):
        return {key: _fixed(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, deque)):
        return [_fixed(item, depth - 1) for item in value]
    if is_data(value) and not type(value).__module__.startswith(__name__.partition(".")[0]):  # not this package's own
        return id(value), _fixed(vars(value), depth - 1)
    return value
