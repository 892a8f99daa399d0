"""Files that are there as a whole or not at all."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modules import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Place = str | os.PathLike[str]


def write_whole(path: Place, write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file beside ``path``, with the same ending, and put it in its place.

    A device (``/dev/stdout``) is written to itself.

    Raises:
        OSError: it cannot be written to. The file of before is left, and nothing beside it.
    """
    target = Path(path)
    with _told(target):
        if _is_device(target):
            write(target)
            return
        beside = _beside(target)
        try:
            write(beside)
            beside.replace(target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def write_json(path: Place, value: Any, *, indent: int = 2) -> None:
    """Write a value as JSON.

    Raises:
        OSError: it cannot be written to.
    """
    text = json.dumps(finite(value), indent=indent, allow_nan=False) + "\n"
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def finite(value: Any) -> Any:
    """The same with None for numbers that are infinite or NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_picture(path: Place, figure: "Figure") -> None:
    """Write a figure of matplotlib, in the format that the ending names.

    Raises:
        ValueError: the ending names none.
        OSError: it cannot be written to.
    """
    expect_picture(path)
    write_whole(path, lambda beside: figure.savefig(beside, dpi=150))


def expect_writable(path: Place) -> None:
    """Raise now what writing would raise later, after all has been computed.

    Raises:
        OSError: there is no such folder, or it cannot be written to.
    """
    target = Path(path)
    with _told(target):
        if target.is_dir():
            target.write_bytes(b"")  # the system refuses it, and says why
        if not _is_device(target):
            _beside(target).touch()
            _beside(target).unlink()


def expect_picture(path: Place) -> None:
    """Raise if the ending names no format of pictures.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: so it is.
    """
    known = need("matplotlib.figure", extra="evaluate").Figure().canvas.get_supported_filetypes()
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending not in known:
        raise ValueError(
            f"expected a picture with one of the endings {', '.join(sorted(known))}, got {os.fspath(path)!r}: name it "
            f"picture.png, say"
        )


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """An error of the system names what was asked for, and not the file beside it."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"expected a file that can be written to, got {target}: {error.strerror or error}. Choose another, or make "
            f"its folder, or room"
        ) from error


def _is_device(target: Path) -> bool:
    """Whether it is written to itself; a link among the devices may lead to a file, as /dev/stdout does."""
    if target.parent in (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd")):
        return target.exists()
    return target.exists() and not target.is_file() and not target.is_dir()


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.stem}-{os.getpid()}{target.suffix}")
