"""What is in a tensor, as bytes and as a short hash (PyTorch gives bytes through NumPy alone, which may be missing)."""

import ctypes
import hashlib

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> bytes:
    """All entries of a tensor of any layout, in their order."""
    own = tensor.detach()
    whole = (own if own.layout == torch.strided else own.to_dense()).cpu().contiguous()
    return ctypes.string_at(whole.data_ptr(), whole.numel() * whole.element_size()) if whole.numel() else b""


def digest(content: bytes, size: int = 16) -> str:
    """A hash of so many bytes, in hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=size).hexdigest()
