"""What ``evaluate`` writes: it can be gone on with after a kill at any moment, and read again."""

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastadv_adapters import FastAttackModel, Report
from tests.evaluation.processes import forked, kill_when, wait_for
from tests.evaluation.runs import EPS, FLOAT32, data, evaluated, lines, verdicts
from tests.support.tools import attackable_net


class StoppedError(Exception):
    """Raised by a callback in the middle."""


def stop_after(count: int, told: list[int]) -> Any:
    def callback(row: Any) -> None:
        told.append(row.index)
        if len(told) == count:
            raise StoppedError

    return callback


@pytest.fixture(scope="module")
def whole() -> Report:
    return evaluated()


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv_adapters.evaluation.running.SIZE", 4)  # samples are written after every fourth


def test_an_evaluation_that_was_stopped_goes_on(whole: Report, tmp_path: Path) -> None:
    told: list[int] = []
    with pytest.raises(StoppedError):
        evaluated(output=tmp_path, callback=stop_after(9, told))
    before = lines(tmp_path)
    assert 9 <= len(before) < len(whole.samples)
    part = Report.load(tmp_path)
    assert not part.complete
    assert "are not finished" in str(part)
    report = evaluated(output=tmp_path, callback=stop_after(1000, told))
    assert verdicts(report) == verdicts(whole)
    assert len(set(told)) == len(told), "nothing finished is computed again"
    assert set(before) <= set(lines(tmp_path))
    assert sorted(report.adversarials()) == sorted(whole.adversarials())
    assert all(torch.equal(x, whole.adversarials()[i]) for i, x in report.adversarials().items())


def test_a_finished_evaluation_is_read_and_nothing_is_attacked(whole: Report, tmp_path: Path) -> None:
    first = evaluated(output=tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["adversarials-all-00000.safetensors", "header.json", "rows.jsonl"]
    told: list[int] = []
    assert evaluated(output=tmp_path, callback=stop_after(1, told)) == first == Report.load(tmp_path)
    assert told == []


def test_a_call_that_finds_all_finished_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for call in range(2):
        evaluated(data(8), output=tmp_path, progress=True)
        said = f"evaluate: already finished; report read from {tmp_path}\n"
        assert (capsys.readouterr().err == said) == (call == 1)
    evaluated(data(8), output=tmp_path)
    assert capsys.readouterr().err == "", "nothing is told if no progress is asked for"


def test_killed_at_random_moments_it_ends_as_if_let_alone(whole: Report, tmp_path: Path) -> None:
    generator = random.Random(0)
    for _ in range(3):
        count = len(lines(tmp_path)) + generator.randint(1, 8)
        process = forked(lambda: evaluated(output=tmp_path))
        kill_when(process, lambda least=count: len(lines(tmp_path)) >= least)  # type: ignore[misc]
        for path in tmp_path.glob("*.safetensors"):
            assert load_file(path)["index"].numel()
        indices = [json.loads(line)["index"] for line in lines(tmp_path)]
        assert len(set(indices)) == len(indices)
    assert wait_for(forked(lambda: evaluated(output=tmp_path))) == 0
    assert verdicts(Report.load(tmp_path)) == verdicts(whole)


def test_a_line_that_is_half_written_is_left_out_and_mended(whole: Report, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        evaluated(output=tmp_path, callback=stop_after(5, []))
    (path,) = tmp_path.glob("rows-*.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "adversarials-0000-0000-00009.safetensors.1.unfinished").write_bytes(b"half")
    assert verdicts(evaluated(output=tmp_path)) == verdicts(whole)
    assert len(lines(tmp_path)) == len(whole.samples)
    assert not list(tmp_path.glob("*unfinished"))


def test_a_full_disk_harms_nothing_that_is_finished(
    whole: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = os.fsync
    left = iter(range(5))

    def full(file: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(file)

    with monkeypatch.context() as patch:
        patch.setattr("fastadv_adapters.evaluation.store.os.fsync", full)
        with pytest.raises(OSError, match=r"expected to write .* got No space left"):
            evaluated(output=tmp_path)
    assert not list(tmp_path.glob("*unfinished"))
    kept = len(Report.load(tmp_path).samples)
    assert 0 < kept < len(whole.samples)
    assert verdicts(evaluated(output=tmp_path)) == verdicts(whole)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "eps": ({"eps": 2 * EPS}, "settings eps"),
    "seed": ({"seed": 1}, "settings seed"),
    "attacks": ({"attacks": ["safe-pgd-ce-6"]}, "settings attacks"),
    "model": ({"model": FastAttackModel(attackable_net().double(), **FLOAT32)}, "model hash"),
    "data": ({"given": data(24)}, "data samples"),
    "images": ({"given": (1 - data()[0], data()[1])}, "data hash"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_evaluation_in_the_same_folder_is_refused_by_what_differs(name: str, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        evaluated(output=tmp_path, callback=stop_after(1, []))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    settings, named = OTHERS[name]
    with pytest.raises(ValueError, match=f"expected the evaluation in .* to have the same {named}, got"):
        evaluated(output=tmp_path, **settings)
    with pytest.raises(ValueError, match="expected an empty output folder for resume=False"):
        evaluated(output=tmp_path, resume=False)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_to_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="expected an output folder that can be written to, got"):
        evaluated(output=tmp_path / "file")
    with pytest.raises(ValueError, match="expected the folder of an evaluation"):
        Report.load(tmp_path)
    (tmp_path / "header.json").write_text("{}")
    with pytest.raises(ValueError, match="to be the header of an evaluation"):
        evaluated(output=tmp_path)


def test_a_report_is_written_and_drawn(tmp_path: Path) -> None:
    report = evaluated(eps=[EPS / 2, EPS], output=tmp_path / "run")
    report.to_json(tmp_path / "report.json")
    report.plot(tmp_path / "plot.png")
    report.triples(tmp_path / "triples.png", 3)
    told = json.loads((tmp_path / "report.json").read_text())
    for name in ("clean_accuracy", "robust_accuracy", "by_attack", "borderline", "denied", "quote"):
        assert told[name] == getattr(report, name)
    assert told["interval"] == list(report.interval)
    assert all(f"\n  eps = {eps:.6g}: {100 * share:.2f} %" in str(report) for eps, share in report.curve.items())
    assert len(told["samples"]) == len(report.samples)
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("plot.png", "triples.png"))
    with pytest.raises(ValueError, match="expected a broken sample whose images are kept"):
        evaluated(eps=0.0).triples(tmp_path / "none.png")
