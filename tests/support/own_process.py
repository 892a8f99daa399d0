"""Tests that run in a process of their own: what breaks there, a CUDA context say, breaks for no other test."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

MARK = "own_process"
INSIDE = "FASTADV_TEST_IN_OWN_PROCESS"
SECONDS = 120.0


def put_last(items: list[pytest.Item]) -> None:
    """Tests with the mark come after all others."""
    items.sort(key=lambda item: item.get_closest_marker(MARK) is not None)


def run_alone(node: str, root: Path, options: Sequence[str] = (), *, seconds: float = SECONDS) -> None:
    """Run one test by itself; fails with its output if it fails, dies, is skipped or takes longer than `seconds`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, node]
    try:
        done = subprocess.run(
            command, cwd=root, env=os.environ | {INSIDE: "1"}, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{node} took longer than {seconds:g} s: {error.stdout!r}")
    if done.returncode or " passed" not in done.stdout:
        pytest.fail(f"{node} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker(MARK) is None or INSIDE in os.environ:
        return None
    engine = pyfuncitem.config.getoption("--engine")
    run_alone(pyfuncitem.nodeid, pyfuncitem.config.rootpath, ["--engine", str(engine)])
    return True
