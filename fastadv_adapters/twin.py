"""The full-precision twin: the wrapped model's structure, in eval mode, on its own weights."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .copying import alias, clone, copy_module
from .engines import EagerEngine
from .precision import Precision


class Twin:
    """A copy of the source whose parameters are the source's own, as detached aliases.

    Buffers are always the twin's own, since a forward pass may write into them.

    Args:
        source: the wrapped model.
        precision: of the fast network; the twin takes the device from it.
        live: whether parameters are aliases; else they are clones, which stay as they are until :meth:`follow`.
    """

    def __init__(self, source: nn.Module, precision: Precision, *, live: bool) -> None:
        self._live = live
        network = copy_module(source, alias if live else clone)
        self._parts = list(zip(source.modules(), network.modules(), strict=True))
        for part in network.modules():
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else clone(buffer)
        dtypes = {p.dtype for p in source.parameters() if p.is_floating_point()}
        native = dtypes.pop() if len(dtypes) == 1 else None
        self.engine = EagerEngine(network, replace(precision, dtype=torch.float32), convert=False, native=native)

    def follow(self) -> None:
        """Alias again what was replaced or moved in the source, and copy the rest."""
        for theirs, ours in self._parts:
            _alias_again(vars(theirs), vars(ours), live=self._live)
            _alias_again(theirs._parameters, ours._parameters, live=self._live)
            for name, buffer in theirs._buffers.items():
                copied = ours._buffers[name]
                if buffer is not None and copied is not None:
                    copied.copy_(buffer)


def _alias_again(theirs: dict[str, Any], ours: dict[str, Any], *, live: bool) -> None:
    for name, tensor in theirs.items():
        if isinstance(tensor, Tensor):
            own = ours.get(name)
            if not live:
                ours[name] = clone(tensor)
            elif not isinstance(own, Tensor) or _place(tensor) != _place(own):
                ours[name] = alias(tensor)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
