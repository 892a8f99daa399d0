"""Samples keep their index, whatever they come in; and how far an evaluation is, is shown."""

import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from fastadv_adapters.evaluation.data import look_at, samples_of
from fastadv_adapters.evaluation.progress import Progress
from fastadv_adapters.evaluation.sharing import Count

X, Y = torch.arange(20.0).view(20, 1) / 20, torch.arange(20) % 3
SET = TensorDataset(X, Y)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Any:
        return iter(SET)


LOADERS: dict[str, tuple[Any, list[int]]] = {
    "in order": (DataLoader(SET, batch_size=3), list(range(20))),
    "shuffled": (DataLoader(SET, batch_size=3, shuffle=True), list(range(20))),
    "a share of each process": (
        DataLoader(SET, sampler=DistributedSampler(SET, num_replicas=2, rank=1)),
        list(range(20)),
    ),
    "a subset": (DataLoader(SET, sampler=SubsetRandomSampler([7, 3, 5])), [3, 5, 7]),
    "a sampler of one's own": (DataLoader(SET, sampler=[4, 2, 9]), [2, 4, 9]),
    "batches of one's own": (DataLoader(SET, batch_sampler=[[5, 4], [1]]), [1, 4, 5]),
    "batches of a sampler": (DataLoader(SET, batch_sampler=BatchSampler(RandomSampler(SET), 3, True)), list(range(20))),
    "a stream": (DataLoader(Stream(), batch_size=3), list(range(20))),
    "a data set": (SET, list(range(20))),
    "batches": ([(X[:9], Y[:9]), (X[9:], Y[9:])], list(range(20))),
}


@pytest.mark.parametrize("name", LOADERS)
def test_samples_come_by_index(name: str) -> None:
    data, order = LOADERS[name]
    samples = samples_of(data, None)
    assert samples.count == len(order)
    x, y = samples.read([2, 0])
    assert x.flatten().tolist() == X[[order[2], order[0]]].flatten().tolist()
    assert y.tolist() == Y[[order[2], order[0]]].tolist()
    assert samples_of(data, 2).count == 2


def test_labels_come_where_images_are() -> None:
    class Elsewhere(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return X[index].to("meta"), Y[index]

    assert {part.device.type for part in samples_of(Elsewhere(X, Y), None).read([2, 0])} == {"meta"}


def test_what_never_ends_is_read_up_to_the_limit() -> None:
    endless = iter(lambda: (X[:6], Y[:6]), None)
    assert samples_of(endless, 10).count == 10


def test_a_collate_function_that_drops_samples_is_named() -> None:
    def kept(items: list[Any]) -> Any:
        return default_collate([item for item in items if item[1] != 1])

    samples = samples_of(DataLoader(SET, batch_size=4, collate_fn=kept), None)
    with pytest.raises(ValueError, match=r"expected collate_fn to give a row for each of the 20 samples .* got 13"):
        look_at(samples, (0, 1), lambda x: 3)
    assert samples.read([0, 2])[1].tolist() == [0, 2]


def test_a_loader_that_repeats_samples_is_refused() -> None:
    loader = DataLoader(SET, sampler=RandomSampler(SET, num_samples=5))
    with pytest.raises(ValueError, match="expected a loader that gives each sample once"):
        samples_of(loader, None)
    loader = DataLoader(SET, sampler=[1, 2, 1])
    with pytest.raises(ValueError, match="expected a loader that gives each sample once"):
        samples_of(loader, None)


def test_images_of_several_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected images of one shape in data, got \[\(1,\), \(2,\)\]"):
        samples_of([(X, Y), (torch.rand(2, 2), Y[:2])], None)


def test_who_samples_are_depends_on_every_value_and_label() -> None:
    def looked(x: Tensor, y: Tensor) -> Any:
        return look_at(samples_of((x, y), None), (0.0, 1.0), lambda images: 3)

    one, moved = looked(X, Y), X.clone()
    moved[7] = 1.0
    other = looked(moved, Y)
    assert [i for i, (a, b) in enumerate(zip(one.hashes, other.hashes, strict=True)) if a != b] == [7]
    prints = [seen.fingerprint for seen in (one, other, looked(X, Y.flip(0)), looked(X.double(), Y), looked(X, Y))]
    assert len(set(prints)) == 4
    assert prints[0] == prints[-1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_progress_counts_what_is_on_its_way_as_standing(
    kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = kind()
    monkeypatch.setattr(sys, "stderr", shown)
    with Progress(20, 4, 1, show=True) as progress:
        progress.update(Count(begun=6, finished=3, broken=3), last=True)
    assert "7/20" in shown.getvalue()
    assert "60.0 % robust" in shown.getvalue()  # of ten that have begun four are broken


def test_a_terminal_without_rich_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with Progress(20, 4, 1, show=True) as progress:
        progress.update(Count(begun=6, finished=3, broken=3), last=True)
    assert shown.getvalue().startswith("evaluate: 7/20 samples, 60.0 % robust, ")


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_progress_tells_the_pace_of_this_call(kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished before cost it no time, and samples that come at once do not make it fast."""
    shown, clock = kind(), [100.0]
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("fastadv_adapters.evaluation.progress.time.monotonic", lambda: clock[0])
    with Progress(1000, 900, 450, begun=912, notes=["first"], show=True) as progress:
        clock[0] += 16
        progress.update(Count(6, 6, 0))
        clock[0] += 0.001
        progress.update(Count(32, 32, 0), last=True)
        assert str(progress) == "2.0 samples/s, 0:00:34 left"
        clock[0] += 16
        assert str(progress) == "1.0 samples/s, 0:01:08 left", "time goes on between two updates"
    assert shown.getvalue().startswith("evaluate: note: first\n")
    assert "samples/s, 0:0" in shown.getvalue()


def test_progress_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that were on their way stood so far, and still do."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "200")
    with Progress(20, 4, 3, begun=10, show=True):
        pass
    assert "4/20" in shown.getvalue()
    assert "70.0 % robust" in shown.getvalue()


def test_nothing_is_shown_if_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(20, 0, 0, notes=["first"], show=False) as progress:
        progress.update(Count(1, 1, 1), last=True)
    assert capsys.readouterr() == ("", "")
