"""The command: comparing and evaluating a model on data, both named on a command line.

``models`` and ``data`` find what is named, by ``locating``; ``numbers`` reads fractions, shapes and requirements. The
commands stand in ``app``, their options in ``arguments``; ``info`` tells what there is, ``demo`` trains what is shown.
``failing`` makes one line and an exit status of what goes wrong, in which options have their names, and ``speaking``
lets one process of several say it.
"""

import sys

from ..modules import need
from .speaking import say

__all__ = ["main"]


def main() -> None:
    """Run the command, and end the process with its exit status."""
    try:
        for name in ("typer", "rich"):
            need(name, extra="cli")
    except ImportError as error:
        say(str(error))
        sys.exit(2)
    from .app import app

    app()
