"""Several processes share an evaluation, and it ends if one of them dies."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn

from fastadv_adapters import Report
from fastadv_adapters.evaluation import evaluating, sharing
from tests.evaluation.processes import forked, kill_when, meeting_point, wait_for
from tests.evaluation.runs import data, evaluated, lines, verdicts

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole() -> Report:
    return evaluated(data(37))


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv_adapters.evaluation.running.SIZE", 4)
    monkeypatch.setattr(sharing, "SILENT", 2.0)
    monkeypatch.setattr(sharing, "_BEAT", 0.2)


def in_memory() -> Any:
    """A store as processes share one."""
    return dist.HashStore()  # type: ignore[attr-defined]


def share(folder: Path) -> None:
    """What each process does."""
    evaluated(data(37), output=folder)


def test_two_processes_find_what_one_finds(whole: Report, tmp_path: Path) -> None:
    place = meeting_point()
    both = [forked(lambda: share(tmp_path), RANK=str(rank), **place) for rank in range(2)]
    assert [wait_for(process) for process in both] == [0, 0]
    assert verdicts(Report.load(tmp_path)) == verdicts(whole)
    assert len(lines(tmp_path)) == 37
    assert sorted(path.name for path in tmp_path.glob("rows*")) == ["rows.jsonl"]


def test_what_a_process_had_taken_is_taken_again_if_it_dies(whole: Report, tmp_path: Path) -> None:
    place = meeting_point()
    first, second = (forked(lambda: share(tmp_path), RANK=str(rank), **place) for rank in range(2))
    kill_when(second, lambda: any(path.stat().st_size for path in tmp_path.glob("rows-0000-0001.jsonl")))
    before = lines(tmp_path)
    assert wait_for(first) == 0
    assert verdicts(Report.load(tmp_path)) == verdicts(whole)
    assert set(before) <= set(lines(tmp_path)), "what it had finished is not computed again"
    assert len(before) < len(lines(tmp_path)) == 37


def test_the_error_of_one_is_that_of_all(tmp_path: Path) -> None:
    def refused() -> None:
        with pytest.raises(ValueError, match="expected labels of at least 0, got -1"):
            evaluated((data(8)[0], data(8)[1] * 0 - 1), output=tmp_path / "run")

    place = meeting_point()
    both = [forked(refused, RANK=str(rank), **place) for rank in range(2)]
    assert [wait_for(process) for process in both] == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_several_processes_need_a_folder() -> None:
    store = in_memory()
    together = sharing.Together(store, 0, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastadv_adapters.evaluation.evaluating.sharing", lambda: together)
        with pytest.raises(ValueError, match="expected an output folder that all 2 processes share, got None"):
            evaluated()


def test_every_sample_is_taken_once_and_a_fast_process_takes_more() -> None:
    store, todo = in_memory(), list(range(37))
    fast, slow = (sharing.Together(store, rank, 2) for rank in range(2))
    begun = next(iter(slow.chunks(todo)))
    taken = [index for chunk in fast.chunks(todo) for index in chunk]
    assert sorted(begun + taken) == todo
    assert len(taken) > len(begun)


def test_a_chunk_whose_owner_died_before_it_said_so_is_inherited_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "SILENT", 0.1)
    store, todo = in_memory(), list(range(8))
    store.add("next", 1)  # a process took the first chunk, and no more is known
    heirs = [sharing.Together(store, rank, 3) for rank in range(2)]
    for heir in heirs:
        for chunk in heir.chunks(todo):
            heir.done(chunk, 0)
    found: list[list[int] | None] = []

    def inherit(heir: sharing.Together) -> None:
        while (more := heir.inherited(lambda: {0})) is not None:
            found.append(more)
            heir.done(more, 0)

    threads = [threading.Thread(target=inherit, args=[heir]) for heir in heirs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    first = next(iter(sharing.Together(in_memory(), 0, 3).chunks(todo)))
    assert found == ([[index for index in first if index != 0]] if len(first) > 1 else [])


def test_who_fails_and_lives_on_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = sharing.Together(in_memory(), 0, 1)
    monkeypatch.setattr(evaluating, "sharing", lambda: together)

    def broken(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("no such attack")

    with pytest.raises(RuntimeError, match="no such attack"):
        evaluated(attacks=broken, output=tmp_path)
    assert together._stop.is_set()


def test_torchrun_starts_them_and_starts_them_again(whole: Report, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, torch\n"
        "torch.set_num_threads(1)\n"
        "from fastadv_adapters.evaluation import running\n"
        "from tests.evaluation.runs import data, evaluated\n"
        "running.SIZE = 4\n"
        "def die(row):\n"
        "    if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"evaluated(data(37), output={str(tmp_path / 'run')!r}, callback=die)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "--max-restarts", "1", str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert verdicts(Report.load(tmp_path / "run")) == verdicts(whole)
    indices = [json.loads(line)["index"] for line in lines(tmp_path / "run")]
    assert indices == list(range(37))
