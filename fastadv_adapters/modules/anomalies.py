"""PyTorch's anomaly mode, which makes a NaN in a backward pass an error, where NaN are counted and taken out."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_anomaly_mode() -> AbstractContextManager[None]:
    """Leave anomaly mode; the caller's own backward pass is back in it afterwards."""
    return torch.autograd.set_detect_anomaly(False) if torch.is_anomaly_enabled() else nullcontext()
