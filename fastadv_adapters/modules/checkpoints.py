"""Checkpoints: reentrant ones run as the other kind inside a network's own runs, and trial runs are hidden from all."""

import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.utils import checkpoint


class _Mark:
    """Of one run of ours: it dies with the frame of that, so an interrupt at any line leaves none behind."""


class _Here(threading.local):
    """The run of ours that this thread is in."""

    mark: weakref.ref[_Mark] | None = None

    @property
    def inside(self) -> bool:
        """Whether there is one."""
        return self.mark is not None and self.mark() is not None


_here = _Here()
_lock = threading.RLock()
_marks = set[weakref.ref[_Mark]]()  # of all threads


class _StandIn:
    """In the place of PyTorch's Function, which ``checkpoint()`` looks up in its module at each call."""

    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        """Checkpoint, without reentering autograd if this thread is in a run of ours."""
        if not _here.inside:
            return _theirs[_REENTRANT].apply(function, preserve_rng_state, *args)
        return checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, determinism_check="none"
        )


def _other(function: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of the other kind: what runs again in a backward pass must make the same checkpoints inside."""
    if not _here.inside:
        return _theirs[_OTHER](function, *args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        with without_reentrant_checkpoints():
            return function(*args, **kwargs)

    return _theirs[_OTHER](run, *args, **kwargs)


_REENTRANT, _OTHER = "CheckpointFunction", "_checkpoint_without_reentrant_generator"
_OURS: dict[str, Any] = {_REENTRANT: _StandIn, _OTHER: _other}
_theirs: dict[str, Any] = {name: vars(checkpoint)[name] for name in _OURS}


def unhooked() -> AbstractContextManager[Any]:
    """For runs that are no part of the caller's graph: a checkpoint around the call counts tensors that are saved."""
    try:
        with disable_saved_tensors_hooks("asked whether there are any"):
            return nullcontext()  # torch.func refuses to run where there are, and PyTorch checks no versions there
    except RuntimeError:
        return saved_tensors_hooks(_pack, _unpack)


def _pack(saved: Tensor) -> tuple[Tensor, int]:
    return saved.detach(), saved._version  # the tensor itself would hold the node that holds it


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    saved, version = packed
    if saved._version != version:
        raise RuntimeError("expected what a backward pass needs to stay as it is, got a tensor changed in place")
    return saved


def without_reentrant_checkpoints() -> AbstractContextManager[None]:
    """Inside, checkpoints of this thread keep what they keep otherwise, but may be differentiated in any way.

    PyTorch refuses ``autograd.grad`` through a reentrant checkpoint, since gradients of parameters would be lost.
    Networks behind a boundary have no such gradients.
    """
    # The compiler knows both kinds, and no threads.
    return nullcontext() if _here.inside or torch.compiler.is_compiling() else _OursHere()


class _OursHere:
    """The context of one run; a class, for each run enters one, and a generator would take twice the time."""

    def __enter__(self) -> None:
        self._mark = _Mark()
        self._found = weakref.ref(self._mark)
        with _lock:
            _marks.add(self._found)
            names = vars(checkpoint)
            for name, ours in _OURS.items():
                if (theirs := names[name]) is not ours:  # PyTorch's own, or what another library put there
                    _theirs[name], names[name] = theirs, ours
        _here.mark = self._found  # last: after an interrupt before it the stand-ins only hand on

    def __exit__(self, *error: object) -> None:
        _here.mark = None
        del self._mark  # a traceback may keep this context
        with _lock:
            _marks.discard(self._found)
            if not any(found() for found in _marks):  # an interrupt leaves dead ones
                _marks.clear()
                vars(checkpoint).update(_theirs)
