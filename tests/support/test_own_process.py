"""Tests that run in a process of their own do so, and what goes wrong there is told."""

import os
from pathlib import Path
from unittest import mock

import pytest

from tests.support.own_process import INSIDE, put_last, run_alone


@pytest.mark.own_process
def test_it_runs_there() -> None:
    assert INSIDE in os.environ


def test_others_do_not() -> None:
    assert INSIDE not in os.environ


@pytest.mark.long
@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("assert 1 == 2", "assert 1 == 2"),
        ("os._exit(3)", "ended with 3"),
        ("pytest.skip('no device')", "1 skipped"),
        ("time.sleep(60)", "took longer than"),
    ],
)
def test_what_goes_wrong_there_is_told(body: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(f"import os, time, pytest\ndef test_it() -> None:\n    {body}\n")
    with pytest.raises(pytest.fail.Exception, match=told):
        run_alone("test_it.py::test_it", tmp_path, seconds=5.0 if "sleep" in body else 60.0)


def test_they_come_last(request: pytest.FixtureRequest) -> None:
    marked = [item.get_closest_marker("own_process") is not None for item in request.session.items]
    assert marked == sorted(marked)


def test_they_are_put_last() -> None:
    marked, other = (mock.Mock(spec=pytest.Item) for _ in range(2))
    marked.get_closest_marker.return_value = pytest.mark.own_process.mark
    other.get_closest_marker.return_value = None
    items: list[pytest.Item] = [marked, other, marked]
    put_last(items)
    assert items == [other, marked, marked]
