"""The bytes of a tensor, for hashes; PyTorch has a way of its own through NumPy alone, which it does not install."""

import ctypes

from torch import Tensor


def bytes_of(tensor: Tensor) -> bytes:
    """All entries in their order, as they lie in memory."""
    whole = tensor.detach().cpu().contiguous()
    return ctypes.string_at(whole.data_ptr(), whole.numel() * whole.element_size()) if whole.numel() else b""
