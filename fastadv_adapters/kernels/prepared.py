"""Faster ways on CUDA that nobody has measured yet: each behind a switch, all of them off."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass
class Switches:
    """What fast networks do that are built from now on; for measurements and tests.

    Attributes:
        narrow_norms: layer, group and RMS norms read and write 16 bits, with statistics in float32.
        narrow_stream: what a model's own modules add or multiply by is kept in 16 bits; only with narrow norms.
        fused: convolution, bias and ReLU, with an addition between or without, are one operator of cuDNN's.
        first_channels: convolutions of 3 channels run on so many, 4 or 8, of which the others are zero; 0: as they are.
        device: the kind of device all this is for; a rehearsal names another.
    """

    narrow_norms: bool = False
    narrow_stream: bool = False
    fused: bool = False
    first_channels: int = 0
    device: str = "cuda"

    def on(self, device: torch.device) -> "Switches":
        """The switches for a network on this device."""
        return self if device.type == self.device else Switches()


SWITCHES = Switches()


@contextmanager
def switched(**changes: Any) -> Iterator[None]:
    """Build networks otherwise inside: at the first call of a fast model too. For all threads."""
    before = asdict(SWITCHES)
    vars(SWITCHES).update(asdict(Switches(**{**before, **changes})))
    try:
        yield
    finally:
        vars(SWITCHES).update(before)
