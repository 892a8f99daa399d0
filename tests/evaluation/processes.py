"""Processes of their own, forked from the test so that nothing is imported again, and killed as by `kill -9`."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

import torch


def forked(function: Callable[[], object], **environment: str) -> int:
    """Start a function in a process of its own; returns its id. It ends with status 0, or 1 if the function raises."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(environment)
        function()
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(status)


def wait_for(process: int, *, within: float = 120.0) -> int:
    """The status with which it ended, negative if it was killed; one that hangs is killed."""
    deadline = time.monotonic() + within
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])


def kill_when(process: int, ready: Callable[[], bool], *, within: float = 60.0) -> None:
    """Kill a process as soon as something is so."""
    deadline = time.monotonic() + within
    while not ready():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    assert wait_for(process) == -signal.SIGKILL


def meeting_point() -> dict[str, str]:
    """Where two processes meet, as torchrun would tell them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
