"""Copied and unpickled networks are built at the first use: before, their copy of the source may not be whole."""

import threading
from typing import Any

import torch
from torch import nn


class BuiltLater:
    """What networks are until they are used: their source, and the options to build them with."""

    source: nn.Module
    _lock: threading.RLock

    def __new__(cls, *args: Any, **kwargs: Any) -> "BuiltLater":
        """Give it its lock before all else: one thread may build what another one is about to use."""
        made = super().__new__(cls)
        made._lock = threading.RLock()
        return made

    @classmethod
    def blank(cls) -> "BuiltLater":
        """One that is not built, as yet without a source; views share it."""
        return cls.__new__(cls)

    def __setstate__(self, state: tuple[nn.Module, dict[str, Any]]) -> None:
        vars(self).update(zip(("source", "_unbuilt"), state, strict=True))

    def __getattr__(self, name: str) -> Any:
        """Build copied or unpickled networks at the first use: before, their copy of the source may not be whole."""
        with self._lock, torch.inference_mode(False):
            if "_unbuilt" in vars(self):
                state = dict(vars(self))
                try:
                    self.__init__(self.source, **vars(self).pop("_unbuilt"))  # type: ignore[misc]
                except BaseException:
                    for made in vars(self).keys() - state.keys():
                        del vars(self)[made]
                    vars(self).update(state)
                    raise
            if name in vars(self):
                return vars(self)[name]
        return super().__getattribute__(name)
