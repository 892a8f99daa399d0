"""Reentrant checkpoints, which allow no ``autograd.grad``, run as the other kind inside a network's own runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import checkpoint

_REENTRANT = checkpoint.CheckpointFunction


class _Here(threading.local):
    """Whether this thread is in a run of ours."""

    inside = False


_here = _Here()
_lock = threading.RLock()  # an interrupt may leave it held, and this thread has to go on
_threads: set[int] = set()  # that are in a run


class _StandIn:
    """In the place of PyTorch's Function, which ``checkpoint()`` looks up in its module at each call."""

    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        """Checkpoint, without reentering autograd if this thread is in a run of ours."""
        if not _here.inside:
            return _REENTRANT.apply(function, preserve_rng_state, *args)

        def run(*args: Any) -> Any:  # again in the backward pass, where checkpoints inside have to be of the same kind
            with without_reentrant_checkpoints():
                return function(*args)

        return checkpoint.checkpoint(
            run, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, determinism_check="none"
        )


@contextmanager
def without_reentrant_checkpoints() -> Iterator[None]:
    """Inside, checkpoints of this thread keep what they keep otherwise, but may be differentiated in any way.

    PyTorch refuses ``autograd.grad`` through a reentrant checkpoint, since gradients of parameters would be lost.
    Networks behind a boundary have no such gradients.
    """
    if _here.inside:
        yield
        return
    if torch.compiler.is_compiling():  # the compiler knows both kinds, and no threads
        yield
        return
    thread = threading.get_ident()
    try:
        _here.inside = True
        with _lock:
            _threads.add(thread)
            vars(checkpoint)["CheckpointFunction"] = _StandIn
        yield
    finally:
        _here.inside = False
        with _lock:
            _threads.discard(thread)
            if not _threads:
                vars(checkpoint)["CheckpointFunction"] = _REENTRANT
