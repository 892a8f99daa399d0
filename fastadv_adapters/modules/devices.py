"""Whether two devices are one: a name may leave the index out, and tensors tell it."""

from typing import Any

import torch


def same_device(one: Any, other: Any) -> bool:
    """Whether both are the same device, each a ``torch.device`` or the name of one.

    Without an index a device is the current one of its type.
    """
    one, other = torch.device(one), torch.device(other)
    return bool(one.type == other.type) and _index(one) == _index(other)


def _index(device: torch.device) -> int:
    index: Any = device.index
    if index is None:  # processors and mps have one device each
        index = torch.cuda.current_device() if device.type == "cuda" and torch.cuda.is_available() else 0
    return int(index)
