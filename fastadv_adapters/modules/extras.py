"""Libraries that only some parts need: imported when they are used, with an error that says what to install."""

import importlib
from types import ModuleType


def need(name: str, *, extra: str, otherwise: str = "") -> ModuleType:
    """The module of this name.

    Args:
        name: of the module.
        extra: of this package, which brings it.
        otherwise: what to do instead, if there is something.

    Raises:
        ImportError: it is not installed; the text names the extra of this package that brings it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise
        package = name.split(".")[0]
        raise ImportError(
            f"expected the package {package} to be installed, got none: pip install 'fastadv_adapters[{extra}]'"
            f"{f', or {otherwise}' if otherwise else ''}"
        ) from error
