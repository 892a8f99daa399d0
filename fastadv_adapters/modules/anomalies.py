"""PyTorch's anomaly mode, which makes a NaN in a backward pass an error, where NaN are counted and taken out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_anomaly_mode() -> Iterator[None]:
    """Leave anomaly mode; the caller's own backward pass is back in it afterwards."""
    if not torch.is_anomaly_enabled():
        yield
        return
    with torch.autograd.set_detect_anomaly(False):
        yield
