"""The one kind of warning this package gives, each with a place in the docs that says why and what to do."""

import sys
import warnings

DOCS = "docs/reliability.md"
_LIBRARIES = ("torchattacks", "foolbox", "eagerpy", "pyautoattack", "autoattack", "adv_lib")
_PASSED_OVER = (__name__.split(".")[0], "torch", "contextlib", *_LIBRARIES)


class FastAttackWarning(UserWarning):
    """The fast model could not do all that was asked of it, and says what it does instead.

    After most warnings results are right as far as self-check and audit can tell; something is slower than it could be,
    or one scale serves the whole call. Four are different. After ``mixed-modes`` the fast model computes the eval-mode
    function, and the model as it is does not. After ``budget-units`` the budget given to ``SafePGD`` is doubtful.
    Before ``old-weights`` results were those of old weights. Before ``audit-failed``, back to the audit before it,
    gradients may have been too coarse.

    Each text ends with the name of its section on the page "Warnings and limits", which tells when it is given and what
    to do.
    """


def notify(message: str, anchor: str) -> None:
    """Warn with ``message`` and where the docs explain it, on behalf of the first caller outside this package."""
    warnings.warn(f"{message} (see {DOCS}#{anchor})", FastAttackWarning, stacklevel=_level_of_caller())


def past(number: float, limit: float, form: str = ".2f") -> str:
    """A number and the limit that it does not keep, in as many digits as tell them apart."""
    digits, kind = int(form[1:-1]), form[-1]
    while (told := f"{number:.{digits}{kind}}") == f"{limit:.{digits}{kind}}" and digits < 17:
        digits += 1
    return f"{told} (limit {limit:.0%})" if kind == "%" else f"{told} (limit {limit:.{max(digits, 4)}g})"


def _level_of_caller() -> int:
    """How far up the stack the user's own line is; frames of the libraries in between are passed over."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _PASSED_OVER:
        level, frame = level + 1, frame.f_back
    return level
