"""The one kind of warning this package gives, each with a place in the docs that says why and what to do."""

import sys
import warnings

DOCS = "docs/reliability.md"
_LIBRARIES = ("torchattacks", "foolbox", "eagerpy", "pyautoattack", "autoattack", "adv_lib")
_PASSED_OVER = (__name__.split(".")[0], "torch", "contextlib", *_LIBRARIES)


class FastAttackWarning(UserWarning):
    """The fast model could not do all that was asked of it, and says what it does instead.

    After most warnings results are right as far as self-check and audit can tell; something is slower than it could be,
    or one scale serves the whole call. Four are different. ``mixed-modes``: the fast model computes the eval-mode
    function, which the model as it is does not. ``budget-units``: the budget that ``SafePGD`` was given is doubtful.
    ``old-weights``: results before it were those of old weights. ``audit-failed``: gradients since the audit before it
    may have been too coarse.

    Each text ends with the anchor in ``docs/reliability.md`` that tells when it is given and what to do.
    """


def notify(message: str, anchor: str) -> None:
    """Warn with ``message`` and where the docs explain it, on behalf of the first caller outside this package."""
    warnings.warn(f"{message} (see {DOCS}#{anchor})", FastAttackWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """How far up the stack the user's own line is; frames of the libraries in between are passed over."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _PASSED_OVER:
        level, frame = level + 1, frame.f_back
    return level
