"""Files that are there as a whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file beside ``path``, with the same ending, and put it in its place.

    What goes wrong is raised, and the file of before is left. A device (``/dev/stdout``) is written to itself.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        write(target)
        return
    beside = target.with_name(f".{target.stem}-{os.getpid()}{target.suffix}")
    try:
        write(beside)
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
