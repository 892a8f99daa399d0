"""A call that raised is run again, if the fast network can be what is wrong, and not the model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..boundary import UnbalancedFoldError
from ..modules import HALF, first_line, notify
from . import remarks
from .pair import Networks

_DTYPES = re.compile("dtype|scalar type|Half|BFloat16")


@contextmanager
def cured(networks: Networks, error: RuntimeError) -> Iterator[None]:
    """Run a call again inside, after what made it raise.

    A layer may be called without its batch norm. And samples that the self-check has not seen may take a branch in
    which tensors of different dtypes meet: then float32 runs such calls from now on, if it does not raise.

    Raises:
        RuntimeError: ``error``, if there is nothing to cure.
    """
    try:
        if isinstance(error, UnbalancedFoldError):
            networks.unfold(error.args)
            yield
            return
        before = {key: kind.dtype for key, kind in networks.kinds.items() if kind.dtype in HALF}
        if not before or not _DTYPES.search(str(error)):
            raise error
        _run_in(networks, dict.fromkeys(before, torch.float32))
        try:
            yield
        except Exception:
            _run_in(networks, before)
            raise error from None
        text = remarks.RAISED.format(next(iter(before.values())), first_line(error))
    finally:
        del error  # its traceback knows this frame: the two would keep the model alive
    networks.notes.append(text)
    notify(f"FastAttackModel of {type(networks.source).__name__}: {text}", "not-half")


def _run_in(networks: Networks, dtypes: dict[object, torch.dtype]) -> None:
    for key, dtype in dtypes.items():
        networks.kinds[key].dtype = dtype
