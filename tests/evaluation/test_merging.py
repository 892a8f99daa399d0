"""Adversarials are merged and shown file by file: few are in memory, and a kill in between loses none."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv_adapters import Report
from fastadv_adapters.evaluation import Row, store
from fastadv_adapters.evaluation.store import Finished, Folder, Writer
from tests.evaluation.runs import EPS, evaluated

SHAPE = (3, 5, 7)


def image(index: int) -> Tensor:
    return torch.full(SHAPE, index / 100)


def written(folder: Path, name: str, indices: list[int], at_once: int = 2) -> None:
    """Broken samples, a few per file."""
    values: dict[str, Any] = dict.fromkeys(("linf", "l2", "l1"), 0.1) | dict.fromkeys(("label", "clean", "denied"), 0)
    values |= {"hash": "", "broken_by": "a", "eps": 0.1, "prediction": 1, "forward": 1, "backward": 1, "seconds": 0.0}
    writer = Writer(Folder(folder), name)
    for first in range(0, len(indices), at_once):
        rows = [Row(index=i, borderline=False, **values) for i in indices[first : first + at_once]]
        writer.write([Finished(row, -image(row.index), image(row.index)) for row in rows])


def kept(folder: Path) -> dict[int, tuple[float, float | None]]:
    found = {}
    for index, adversarial, clean in Folder(folder).images():
        assert adversarial.shape == SHAPE
        found[index] = adversarial.max().item() * 100, None if clean is None else clean.max().item() * 100
    return {index: found[index] for index in sorted(found)}


def of(indices: range) -> dict[int, Any]:
    return {i: pytest.approx((i, -i) if i < store.SHOWN else (i, None)) for i in indices}


def alive() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) and thing.shape[-3:] == SHAPE for thing in gc.get_objects())


def test_few_images_are_in_memory_while_files_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "0000-0000", list(range(60, 100, 2)))
    written(tmp_path, "0000-0001", list(range(61, 100, 2)))
    monkeypatch.setattr(store, "WHOLE", 8)
    most, original = [0], store._write

    def noted(path: Path, content: bytes) -> None:
        most[0] = max(most[0], alive())
        original(path, content)

    monkeypatch.setattr(store, "_write", noted)
    Folder(tmp_path).merge()
    assert most[0] <= 2 * 8
    assert sorted(path.name for path in tmp_path.glob("adv*")) == [
        f"adversarials-all-{n:05}.safetensors" for n in range(5)
    ]
    assert kept(tmp_path) == of(range(60, 100))


def test_large_images_are_merged_into_smaller_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "0000-0000", list(range(70, 90)))
    monkeypatch.setattr(store, "MOST_BYTES", 4 * 4 * 105 * 3)
    Folder(tmp_path).merge()
    assert 3 <= len(list(tmp_path.glob("adv*"))) < 10
    assert kept(tmp_path) == of(range(70, 90))


def test_a_kill_while_files_are_merged_again_loses_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "WHOLE", 4)
    written(tmp_path, "0000-0000", list(range(3, 12)))
    Folder(tmp_path).merge()
    written(tmp_path, "0001-0000", [0, 1, 2, 12, 13])
    original, left = store._write, [2]

    def killed(path: Path, content: bytes) -> None:
        if path.name.startswith("adversarials-all"):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            Folder(tmp_path).merge()
    assert kept(tmp_path) == of(range(14))
    Folder(tmp_path).merge()
    assert kept(tmp_path) == of(range(14))
    assert len(list(Folder(tmp_path).images())) == 14
    assert all(path.name.startswith("adversarials-all") for path in tmp_path.glob("adv*"))


def test_a_picture_reads_what_it_shows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated(eps=2 * EPS, output=tmp_path / "run")
    report, read, original = Report.load(tmp_path / "run"), list[int](), Folder.images

    def noted(self: Folder, *given: Any) -> Any:
        for found in original(self, *given):
            read.append(found[0])
            yield found

    monkeypatch.setattr(Folder, "images", noted)
    report.triples(tmp_path / "t.png", 3)
    assert read == [row.index for row in report.samples if row.linf is not None][:3]
    assert len(report.adversarials()) > 3
