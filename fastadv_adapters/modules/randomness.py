"""The random generators that a model may draw from: PyTorch's, Python's and NumPy's."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .transforms import outside_of_transforms
from .walking import modules_of


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """All generators as before afterwards, on the CPU and on ``device``."""
    numpy: Any = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def seed_generators(seed: int, device: torch.device) -> None:
    """All generators begin at this seed, on the CPU and on ``device``; those of other devices are not touched."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(seed % 2**32)


def host_state() -> tuple[Any, ...]:
    """What all generators but those of devices are at, to be compared."""
    numpy: Any = sys.modules.get("numpy")
    parts = numpy.random.get_state() if numpy else ()
    own = [part.tobytes() if hasattr(part, "tobytes") else part for part in parts]
    return random.getstate(), own, _state_of_torch()


def generator_states(device: torch.device) -> tuple[Any, ...]:
    """What all generators are at, on the CPU and on ``device``, to be compared."""
    return *host_state(), _state_on(device)


def states_of_torch(device: torch.device) -> tuple[Any, ...]:
    """What PyTorch's generators are at, on the CPU and on ``device``; it takes a tenth of the time of all."""
    return _state_of_torch(), _state_on(device)


def _state_of_torch() -> Any:
    # PyTorch 2.6 lets a transform wrap the state, too; and a mode would look at how it is read.
    with outside_of_transforms(), torch._C.DisableTorchFunction():
        state = torch.get_rng_state()
        return state.numpy().tobytes() if sys.modules.get("numpy") else state.view(torch.int64).tolist()


def _state_on(device: torch.device) -> list[int]:
    with torch._C.DisableTorchFunction():
        if device.type == "cuda":
            return torch.cuda.get_rng_state(device).tolist()
        return torch.mps.get_rng_state().tolist() if device.type == "mps" else []


def holds_generator(model: nn.Module) -> bool:
    """Whether a part of a model has a random generator of its own as an attribute."""
    numpy: Any = sys.modules.get("numpy")
    theirs = (numpy.random.Generator, numpy.random.RandomState) if numpy else ()
    kinds = (torch.Generator, random.Random, *theirs)
    return any(isinstance(value, kinds) for part in modules_of(model) for value in vars(part).values())
