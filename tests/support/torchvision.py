"""A torchvision that does not fit PyTorch (torchattacks demands one) is hidden: torchmetrics imports what it finds."""

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def hide_if_broken() -> None:
    """Let torchvision look not installed if importing it fails; call it before importing torchmetrics or lightning."""
    try:
        importlib.import_module("torchvision")
    except Exception:
        _hide()


@functools.cache
def _hide() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    for module, name in (("importlib.metadata", "version"), ("importlib.metadata", "distribution")):
        _without(importlib.import_module(module), name, importlib.metadata.PackageNotFoundError("torchvision"))
    _without(importlib.util, "find_spec", None)


def _without(owner: Any, name: str, answer: Exception | None) -> None:
    """Let a function that is asked for a package by its name answer so for torchvision."""
    asked: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(asked)
    def ask(package: str, *args: Any) -> Any:
        if package.split(".")[0].lower() != "torchvision":
            return asked(package, *args)
        if answer is not None:
            raise answer
        return None

    setattr(owner, name, ask)
