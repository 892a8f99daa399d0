"""The random generators that a model may draw from: PyTorch's, Python's and NumPy's."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """All generators as before afterwards, on the CPU and on ``device``."""
    numpy: Any = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def host_state() -> tuple[Any, ...]:
    """What all generators but those of devices are at, to be compared."""
    numpy: Any = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy else ()
    return random.getstate(), [str(part) for part in state], torch.get_rng_state().tolist()
