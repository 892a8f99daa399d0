"""Tensors of any layout, sparse ones too: where they are, whether they are alike, and written in place."""

import torch
from torch import Tensor, nn

from .walking import modules_of

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def pieces(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that this one consists of; the last one holds its values."""
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [getattr(tensor, name)() for name in _COMPRESSED.get(tensor.layout, ())]


def last_place(tensor: Tensor) -> int:
    """Where the last number of a strided tensor lies behind the first one, counted in numbers."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def pointer(tensor: Tensor) -> tuple[int, ...]:
    """Where in memory it is."""
    return tuple(piece.data_ptr() for piece in pieces(tensor))


def kind(tensor: Tensor) -> tuple[object, ...]:
    """What has to be the same for one tensor to be written over another: shape, layout, dtype, device and class."""
    strides = tensor.stride() if tensor.layout is torch.strided else tensor.layout
    return tensor.shape, strides, tensor.dtype, tensor.device, type(tensor)


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether the two are the same numbers in memory."""
    if one.layout is torch.strided and other.layout is torch.strided:
        return one.is_set_to(other)
    return one.layout is other.layout and one.shape == other.shape and pointer(one) == pointer(other)


def write(own: Tensor, theirs: Tensor) -> bool:
    """Copy into the memory that is there; False if it does not fit."""
    if own.shape != theirs.shape or own.layout is not theirs.layout:
        return False
    if own.layout is torch.strided:  # nearly always; an update writes hundreds
        own.copy_(theirs)
        return True
    pairs = list(zip(pieces(own), pieces(theirs), strict=True))
    if any(a.shape != b.shape for a, b in pairs) or not pairs:
        return False
    for ours, other in pairs:
        ours.copy_(other)
    if own.layout is torch.sparse_coo:
        own._coalesced_(theirs.is_coalesced())
    return True


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one layout hold different numbers; NaN is like NaN."""
    pairs = list(zip(pieces(one), pieces(other), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return True
    return any(bool(((a != b) & ~(a.isnan() & b.isnan())).any()) for a, b in pairs)


def in_one_block(network: nn.Module) -> nn.Module:
    """The same copy, whose recurrent layers have collected their weights anew, on CUDA into one block of memory."""
    for part in modules_of(network):
        if isinstance(part, nn.RNNBase):
            part._apply(lambda tensor: tensor)
    return network
