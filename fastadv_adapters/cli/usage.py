"""Wrong options, told in one line as every other error is."""

import sys
from typing import Any

from typer.core import TyperGroup

from .failing import BAD
from .speaking import say


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
