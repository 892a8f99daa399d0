"""What surrounds runs of throw-away copies."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..modules import ieee_float32, unhooked, without_anomaly_mode


@contextmanager
def trying(device: torch.device) -> Iterator[None]:
    """Run copies inside, by a caller that holds the networks' lock: unseen by hooks, and in float32 as such.

    Backward passes run in this thread: the device's own may wait for that lock.
    """
    with (
        torch.inference_mode(False),
        torch.autograd.set_multithreading_enabled(False),
        unhooked(),
        ieee_float32(device),
        without_anomaly_mode(),
    ):
        yield
