"""Who says what went wrong if several processes run the same command, as under ``torchrun``."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

LINGER = 10.0
"""For so many seconds other processes than the first one wait before they say anything, for it may say the same."""


def is_first() -> bool:
    """Whether this process is the one that reports."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Write one line on standard error, once for all processes, and into the report of ``torchrun``.

    If the first process fails as well, ``torchrun`` ends the others while they wait; so what one of them says is an
    error of its own.
    """
    record(line)
    if is_first():
        sys.stderr.write(f"fastadv: {line}\n")
    else:
        time.sleep(LINGER)
        sys.stderr.write(f"fastadv (process {os.environ['RANK']}): {line}\n")
    sys.stderr.flush()


def record(line: str) -> None:
    """Put a line into the file whose text ``torchrun`` shows at the end, as torch.distributed.elastic describes it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        message = {"message": f"fastadv: {line}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):  # it is said on standard error in any case
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
