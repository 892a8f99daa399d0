"""A call that raised is run again, if the fast network can be what is wrong, and not the model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..boundary import UnbalancedFoldError
from ..modules import first_line
from . import remarks
from .kinds import Kind
from .pair import Networks

_DTYPES = re.compile("dtype|scalar type|Half|BFloat16")


@contextmanager
def cured(networks: Networks, error: Exception, kind: Kind | None) -> Iterator[None]:
    """Run a call again inside, after what made it raise.

    A layer may be called without its batch norm; the model may ask for gradients of its weights. And samples that the
    self-check has not seen may take a branch in which tensors of different dtypes meet: then float32 runs such calls
    from now on, if it does not raise.

    Args:
        networks: of the model.
        error: what was raised.
        kind: that of the call, if half precision ran it.

    Raises:
        Exception: ``error``, if there is nothing to cure, or if float32 raises too.
    """
    try:
        if isinstance(error, UnbalancedFoldError):
            networks.unfold(error.args)
            yield
            return
        if "does not require grad" in str(error) and not networks.twin.thawed:  # of its weights, by its own code
            networks.twin.thaw()
            yield
            return
        if kind is None or not _DTYPES.search(str(error)):
            raise error
        before, kind.dtype = kind.dtype, torch.float32
        try:
            yield
        except BaseException as other:
            kind.dtype = before
            raise error if isinstance(other, Exception) else other from None
        text = remarks.RAISED.format(before, first_line(error))
    finally:
        del error  # its traceback knows this frame: the two would keep the model alive
    networks.say(text, "not-half")
