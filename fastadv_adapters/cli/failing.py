"""What goes wrong, as one line on standard error and an exit status; with ``--debug`` as Python tells it."""

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.core import TyperGroup

from .speaking import is_first, say

BAD, FALLS_SHORT, INTERRUPTED = 2, 1, 130
"""Exit status for wrong use or bad input, for a comparison or a number that falls short, and after Ctrl-C."""

NAMES = ("attacks", "batch_size", "bounds", "data", "eps", "limit", "norm", "output", "repeats", "resume", "seed")
"""Arguments of ``evaluate`` and ``compare`` that are options of the same name."""

_NAME = f"({'|'.join(NAMES)})"
_SUBJECT = re.compile(rf"^expected {_NAME}(?= (?:to (?:be|give|hold|name)|of at least)\b| \()")
_TRUTH = re.compile(rf"\b{_NAME}=(True|False)\b")
_GIVEN = re.compile(rf"\b{_NAME}=(\([^)]*\)|\"[^\"]*\"|[\w.+/-]*\w)")


@contextmanager
def in_one_line(*, debug: bool, after: str = "") -> Iterator[None]:
    """Let an error inside, also one of writing what was printed, end the process with one line and status 2.

    Args:
        debug: whether Python's own report comes before that line.
        after: what to know after Ctrl-C.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        if is_first():
            say(f"interrupted{after}")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        say(said(error))
        sys.exit(BAD)


def said(error: BaseException) -> str:
    """An error in one line: its text with options named as such, and its type if that alone may say too little."""
    text = as_options(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    known = isinstance(error, (ValueError, TypeError, OSError, ImportError)) and text
    return text if known else f"{type(error).__name__}: {text}"


def as_options(text: str) -> str:
    """The text of an error with ``--bounds 0,1`` for ``bounds=(0, 1)``, and with options as its subject."""
    text = _SUBJECT.sub(lambda found: f"expected {_option(found[1])}", text)
    text = _TRUTH.sub(lambda found: f"--{'' if found[2] == 'True' else 'no-'}{_option(found[1])[2:]}", text)
    return _GIVEN.sub(lambda found: f"{_option(found[1])} {_plain(found[2])}", text)


def _plain(value: str) -> str:
    return value.strip('()"').replace(" ", "")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class OneLine(TyperGroup):
    """A group of commands that tells wrong use in one line, and ends with status 2."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command that the arguments name, and end the process with its exit status."""
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except Exception as error:  # commands tell their own errors, so this is one of their arguments
            if not hasattr(error, "format_message"):
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                sys.stderr.write(f"{error.format_message()}\n")
                sys.exit(BAD)
            context = getattr(error, "ctx", None)
            hint = f": see {context.command_path} --help" if context is not None else ""
            say(f"{' '.join(error.format_message().split()).rstrip('.')}{hint}")
            sys.exit(BAD)
        sys.exit(status if isinstance(status, int) else 0)
