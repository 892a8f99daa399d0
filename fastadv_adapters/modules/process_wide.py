"""Objects of which a process has one, which a copy of a model refers to as the model does: loggers and handlers."""

import logging
from typing import Any

_LOGGING = (logging.Filterer, logging.Manager, logging.PlaceHolder, logging.LoggerAdapter)
"""What leads to all loggers of the process: anybody's new logger would be a change of the model."""


def is_process_wide(value: Any) -> bool:
    """Whether an object is shared with all that is not the model, and no part of what that computes."""
    return isinstance(value, _LOGGING)
