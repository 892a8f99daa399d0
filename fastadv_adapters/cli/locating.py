"""``MODULE:NAME``: an object in a module, or in a Python file."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def find(target: str, what: str) -> Any:
    """The object that ``MODULE:NAME`` names, which errors call ``what``; MODULE may be a file, NAME may have dots."""
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"expected {what} as MODULE:NAME, got {target!r}: write package.module:name or file.py:name")
    found: Any = _imported(place, target)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"expected {place} to have {name}, got none of that name: check {target!r}")
        found = getattr(found, part)
    return found


def called(make: Any, target: str, what: str) -> Any:
    """What a callable without arguments makes; ValueError if it raises."""
    try:
        return make()
    except Exception as error:
        raise ValueError(
            f"expected {target} to make {what} without arguments, got {type(error).__name__}: {error}: mend it, or "
            f"name a function that calls it"
        ) from error


def _imported(place: str, target: str) -> ModuleType:
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise ValueError(f"expected a file, got {place}, which is not there: check {target!r}")
    try:
        if is_file:
            return _of_file(Path(place).resolve())
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)  # as python -m has it
        return importlib.import_module(place)
    except Exception as error:
        raise ValueError(
            f"expected {place} to be importable, got {type(error).__name__}: {error}: mend it, or check {target!r}"
        ) from error


def _of_file(path: Path) -> ModuleType:
    """The module in a file, which may import its neighbours as a script may."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    known = path.stem in sys.modules  # another module has this name: it keeps it
    if not known:
        sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except BaseException:
        if not known:
            del sys.modules[path.stem]
        raise
    return module
