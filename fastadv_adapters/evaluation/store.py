"""The files of an evaluation: a header, a line per finished sample, adversarials. A kill at any moment harms none.

A folder holds ``header.json``, written first and at once; ``rows-*.jsonl``, to which each process appends whole lines;
``findings-*.jsonl``, with what failed audits have found; and ``adversarials-*.safetensors``, each written beside and
then renamed, before the lines of its samples are. At the end all lines are merged into ``rows.jsonl``, in order.
"""

import errno
import json
import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modules import need
from .rows import Row

HEADER, MERGED = "header.json", "rows.jsonl"
_ALL = "adversarials-all-"
_UNFINISHED = ".unfinished"

SHOWN = 64
"""Samples with a lower index than this keep their clean image too, for pictures."""

WHOLE = 4096
"""How many adversarials a merged file holds at most."""

MOST_BYTES = 2**28
"""About how large they are together at most, for they are in memory when it is written."""


@dataclass(frozen=True)
class Finished:
    """A finished sample: its row, its image, and the adversarial of a broken one."""

    row: Row
    clean: Tensor
    adversarial: Tensor | None


class Folder:
    """The folder of an evaluation."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def header(self) -> dict[str, Any] | None:
        """What was written first, None if there is nothing yet; ValueError if it is not of this package."""
        path = self.path / HEADER
        if not path.is_file():
            return None
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            header = None
        if not isinstance(header, dict) or "settings" not in header:
            raise ValueError(
                f"expected {path} to be the header of an evaluation, got something else: choose another folder"
            )
        return header

    def begin(self, header: dict[str, Any], *, resume: bool) -> None:
        """Make the folder, or go on in it; ValueError if it holds another evaluation, or any if not ``resume``."""
        made = not self.path.exists()
        try:
            known = self.header()
            if known is None:
                self.path.mkdir(parents=True, exist_ok=True)
                _write(self.path / HEADER, json.dumps(header, indent=1).encode() + b"\n")
            else:
                _write(self.path / f"{HEADER}.check", b"")
                (self.path / f"{HEADER}.check").unlink()
        except OSError as error:
            if made and self.path.is_dir():
                self.path.rmdir()
            raise type(error)(
                f"expected an output folder that can be written to, got {self.path}: {error.strerror or error}. Choose "
                f"another, or make room"
            ) from error
        if known is None:
            return
        if not resume:
            raise ValueError(
                f"expected an empty output folder for resume=False, got {self.path} with an evaluation: choose another "
                f"folder, or go on with resume=True"
            )
        there, here = ({name: part for name, part in one.items() if name != "notes"} for one in (known, header))
        if found := difference(there, here):
            name, there, here = found
            raise ValueError(
                f"expected the evaluation in {self.path} to have the same {name}, got {there!r} there and {here!r} "
                f"here: choose another folder, or call with the same settings, model and data"
            )

    def next_run(self) -> int:
        """A number that no file in the folder has in its name."""
        names = [path.stem.split("-") for path in self.path.iterdir()]
        runs = [int(parts[1]) for parts in names if len(parts) > 2 and parts[1].isdigit()]
        return max(runs, default=-1) + 1

    def clean_up(self) -> None:
        """Remove what a killed process has left unfinished. Nobody else may be writing."""
        for path in self.path.glob(f"*{_UNFINISHED}"):
            path.unlink(missing_ok=True)
        for path in (*self.path.glob("rows*.jsonl"), *self.path.glob("findings-*.jsonl")):
            content = path.read_bytes()
            if content and not content.endswith(b"\n"):
                _write(path, content[: content.rfind(b"\n") + 1])

    def rows(self) -> dict[int, Row]:
        """All finished samples by index."""
        found: dict[int, Row] = {}
        for path in sorted(self.path.glob("rows*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last end of a line is unfinished
                row = Row.of(json.loads(line))
                found[row.index] = row
        return found

    def findings(self) -> list[str]:
        """What failed audits have found, in all calls so far."""
        paths = sorted(self.path.glob("findings-*.jsonl"))
        return [json.loads(line) for path in paths for line in path.read_bytes().split(b"\n")[:-1]]

    def images(self, among: Container[int] | None = None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Adversarials by index, with the clean image if it was kept; some may come twice. All, or ``among`` these."""
        for path in sorted(self.path.glob("adversarials-*.safetensors")):
            yield from _images_in(path, among)

    def merge(self) -> None:
        """Bring lines into one file and adversarials into few, in order. Nobody else may be writing."""
        lines, shards = sorted(self.path.glob("rows-*.jsonl")), sorted(self.path.glob("adversarials-*.safetensors"))
        rows = self.rows()
        if lines:
            text = "".join(f"{json.dumps(rows[index].as_dict())}\n" for index in sorted(rows))
            _write(self.path / MERGED, text.encode())
            for path in lines:
                path.unlink(missing_ok=True)
        if loose := [path for path in shards if not path.name.startswith(_ALL)]:
            self._merge_images(loose, [path for path in shards if path.name.startswith(_ALL)])

    def _merge_images(self, loose: list[Path], merged: list[Path]) -> None:
        """Into files beside those that are merged already, which stay: a kill in between loses nothing."""
        known = {index for path in merged for index in _indices_in(path)}
        places = {index: path for path in loose for index in _indices_in(path)}  # of several the last
        order = sorted(places.keys() - known)
        following = 1 + max((int(path.stem.removeprefix(_ALL)) for path in merged), default=-1)
        size = sum(path.stat().st_size for path in loose)
        room = max(1, min(WHOLE, MOST_BYTES * len(places) // size))
        for number, first in enumerate(range(0, len(order), room), start=following):
            now = order[first : first + room]
            some = {}
            for path in dict.fromkeys(places[index] for index in now):
                among = {index for index in now if places[index] == path}
                some.update({found[0]: found for found in _images_in(path, among)})
            _write(self.path / f"{_ALL}{number:05}.safetensors", _packed([some[index] for index in now]))
        for path in loose:
            path.unlink(missing_ok=True)


class Writer:
    """Appends finished samples to files of its own.

    Args:
        folder: of the evaluation.
        name: of this process; no other has used it in this folder.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name, self._shards = folder, name, 0
        self._lines, self._findings = (folder.path / f"{kind}-{name}.jsonl" for kind in ("rows", "findings"))

    def write(self, finished: list[Finished], findings: Sequence[str] = ()) -> None:
        """Write what failed audits have found, adversarials, and then, in one piece, the lines.

        If the disk is full, say, what was finished before is still there.
        """
        broken = [
            (f.row.index, f.adversarial, f.clean if f.row.index < SHOWN else None)
            for f in finished
            if f.adversarial is not None
        ]
        try:
            if findings:
                _append(self._findings, "".join(f"{json.dumps(text)}\n" for text in findings).encode())
            if broken:
                name = f"adversarials-{self._name}-{self._shards:05}.safetensors"
                _write(self._folder.path / name, _packed(broken))
                self._shards += 1
            if finished:
                _append(self._lines, "".join(f"{json.dumps(f.row.as_dict())}\n" for f in finished).encode())
        except OSError as error:
            raise type(error)(
                f"expected to write {len(finished)} samples to {self._folder.path}, got {error.strerror or error}: "
                f"make room and run the same call again, which goes on from there"
            ) from error


def _images_in(path: Path, among: Container[int] | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Adversarials and clean images of one file, read one by one."""
    with need("safetensors", extra="evaluate").safe_open(path, framework="pt") as file:
        images, clean = file.get_slice("adversarial"), file.get_slice("clean")
        kept = {index: place for place, index in enumerate(file.get_tensor("clean_index").tolist())}
        for place, index in enumerate(file.get_tensor("index").tolist()):
            if among is None or index in among:
                yield index, images[place], clean[kept[index]] if index in kept else None


def _indices_in(path: Path) -> list[int]:
    with need("safetensors", extra="evaluate").safe_open(path, framework="pt") as file:
        found: list[int] = file.get_tensor("index").tolist()
    return found


def _packed(images: list[tuple[int, Tensor, Tensor | None]]) -> bytes:
    """A file of safetensors: ``index`` and ``adversarial``, and ``clean`` of those in ``clean_index``."""
    clean = [(index, image) for index, _, image in images if image is not None]
    shape = images[0][1].shape
    tensors = {
        "index": torch.tensor([index for index, _, _ in images], device="cpu"),
        "adversarial": torch.stack([image.cpu() for _, image, _ in images]),
        "clean_index": torch.tensor([index for index, _ in clean], dtype=torch.int64, device="cpu"),
        "clean": torch.stack([image.cpu() for _, image in clean]) if clean else torch.empty(0, *shape, device="cpu"),
    }
    packed: bytes = need("safetensors.torch", extra="evaluate").save(tensors)
    return packed


def _write(path: Path, content: bytes) -> None:
    """Put a file there whole, or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _append(path: Path, content: bytes) -> None:
    """Append to a file in one piece, or leave it as it was."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            written = file.write(content)
            if written != len(content):
                full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise full
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def difference(there: Any, here: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first difference between two headers, by name; the names of a part are compared last."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return None if there == here else (name, there, here)
    parts = (difference(there[key], here[key], f"{name} {key}".strip()) for key in here if key in there)
    lenient = name == "model settings"  # some are there only once the model has run
    names = None if lenient or list(there) == list(here) else (name or "entries", ", ".join(there), ", ".join(here))
    return next((found for found in parts if found), names)
