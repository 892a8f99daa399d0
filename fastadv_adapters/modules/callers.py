"""Which attack of a library is asking: a model is called without being told, and the stack of calls knows."""

import sys
from types import FrameType
from typing import Any

READERS = {
    "torchattacks": ("CW", "DeepFool", "SparseFool", "FAB", "EADL1", "EADEN", "JSMA", "TPGD"),
    "foolbox": ("MinimizationAttack", "VirtualAdversarialAttack"),
}
"""Classes of attacks that move or stop by decisions that they read off the logits of gradient passes.

(torchattacks' APGD reads them too, but only to choose among its candidates.) TPGD and VirtualAdversarialAttack compare
such logits with those of a pass without gradient: they start so near to each other that half precision in one of them
hides the difference. Subclasses count, users' own too. No library is imported to find out.
"""
_ENTRANCES = ("__call__", "run", "forward")  # methods in which attacks of both libraries begin


def reads_decisions(attack: Any) -> bool:
    """Whether an attack is of one of the classes in ``READERS``, or of one that derives from them."""
    return any(
        kind.__name__ in readers and kind.__module__.split(".")[0] == library
        for kind in type(attack).__mro__
        for library, readers in READERS.items()
    )


def called_by_reader() -> bool:
    """Whether such an attack is running, anywhere up this thread's stack.

    Only the libraries' own frames are looked into: every attack, users' own too, begins in ``__call__`` of its base
    class. Attacks inside an attack count with the outermost, which decides by what they return.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (
            frame.f_code.co_name in _ENTRANCES
            and frame.f_globals.get("__name__", "").split(".")[0] in READERS
            and reads_decisions(frame.f_locals.get("self"))
        ):
            return True
        frame = frame.f_back
    return False
