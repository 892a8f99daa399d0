"""What ``compare`` has found: the rows, a verdict in one sentence, and the options that it recommends."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..options import FastAttackOptions
from .drawing import draw
from .row import Row
from .showing import LEGEND, as_html, lines_of, print_table
from .writing import finite, write_json


@dataclass(frozen=True, repr=False)
class Comparison:
    """The plain model and fast ones under the same attack; made by ``compare``.

    Attributes:
        attack: its name.
        samples: how many images were attacked.
        rows: what was found of each way, the plain model first; see :class:`Row`.
        recommended_row: the name of the row whose options are recommended; None to stay with the plain model.
        reference: dtype of the gradients that cosines and signs are taken with: float64 if the model and the device can
            compute in it, else that of the images.
        setting: eps (None if neither the call nor the attack says it), norm, bounds, repeats.
        device: a mapping with type, name, capability and threads of the device (on CUDA memory, libraries and driver).
        versions: name of a package -> its version as text, and that of Python.
        notes: what to know beside the numbers: a budget, labels or outputs that are seldom meant.
    """

    attack: str
    samples: int
    rows: Sequence[Row]
    recommended_row: str | None
    reference: str
    setting: Mapping[str, Any]
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: Sequence[str] = ()

    @property
    def recommended(self) -> FastAttackOptions | None:
        """Keyword options, ready for ``FastAttackModel(model, **options)``; None: stay with the plain model.

        With them the attack was faster than on the plain model in two measurements, and faithful. An empty dict
        stands for the default options.
        """
        return None if self.recommended_row is None else self.row(self.recommended_row).options

    @property
    def faithful(self) -> bool:
        """Whether the fast model with the default options (or those given) attacks as the plain one does."""
        return self.row("default").faithful

    @property
    def speedup(self) -> float:
        """How many times as fast as the plain model the recommended one is; 1 if that is the plain model."""
        return 1.0 if self.recommended_row is None else self.row(self.recommended_row).ratio

    def row(self, name: str) -> Row:
        """The row of this name; KeyError if there is none."""
        return {row.name: row for row in self.rows}[name]

    @property
    def verdict(self) -> str:
        """Whether it is faster and faithful, in one sentence."""
        default = self.row("default")
        faith = "faithful" if default.faithful else f"NOT faithful ({default.failure or '; '.join(default.faults)})"
        if self.recommended_row is None:
            speed = _speed(default, surely=not default.faithful)
            return f"Stay with the plain model: the fast one is {faith} and {speed}."
        best = self.row(self.recommended_row)
        said = f"The fast model is {_speed(best)} and faithful, with {_written(best.options)}"
        if best is default:
            return f"{said}."
        return f"{said}; with the default options it is {faith} and {_speed(default)}."

    def print(self, file: Any = None) -> None:
        """Print a table, the verdict and the notes.

        Args:
            file: to write to; None for standard output.

        Raises:
            ImportError: rich is not installed.
        """
        print_table(*self._shown, file)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON, its keys the names of the attributes; the file is replaced as a whole."""
        write_json(path, self.record())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: speed with its spread, and how far gradients are from float64; PNG, PDF or SVG by ending.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the ending names no format.
            OSError: it cannot be written to.
        """
        draw(self.rows, self.recommended_row or "", self._title, path)

    def record(self) -> dict[str, Any]:
        """Everything in the types of JSON."""
        named = self.recommended_row
        return {
            "verdict": self.verdict,
            "notes": list(self.notes),
            "recommended": None if named is None else self.row(named).record()["options"],
            "recommended_row": named,
            "faithful": self.faithful,
            "speedup": self.speedup,
            "attack": self.attack,
            "samples": self.samples,
            "reference": self.reference,
            "setting": finite(dict(self.setting)),
            "device": dict(self.device),
            "versions": dict(self.versions),
            "rows": [row.record() for row in self.rows],
        }

    def __repr__(self) -> str:
        return f"Comparison({self.verdict!r})"

    def _repr_html_(self) -> str:
        return as_html(*self._shown)

    @property
    def _title(self) -> str:
        eps, norm = self.setting["eps"], self.setting["norm"]
        budget = f"eps {eps:.4g} in {norm}" if eps is not None else "with a budget of its own"
        return f"{self.attack} on {self.samples} images, {budget}"

    @property
    def _shown(self) -> tuple[str, list[list[str]], str, list[str]]:
        """Title, table, legend, and what is said below."""
        last = [self.verdict, *(f"note: {note}" for note in self.notes)]
        return self._title, lines_of(self.rows, self.recommended_row), LEGEND.format(reference=self.reference), last


def _speed(row: Row, *, surely: bool = True) -> str:
    if row.failure is not None:
        return "not able to run"
    lower, upper = row.spread
    slow = "slower" if row.ratio < 0.95 else "no faster"
    word = slow if row.ratio < 1 else "faster" if surely and lower >= 1 else "hardly faster"
    return f"{word} ({row.ratio:.2f} times as fast, {lower:.2f} to {upper:.2f})"


def _written(options: FastAttackOptions | None) -> str:
    """Options as they are written in code."""
    return ", ".join(f"{name}={value!r}" for name, value in (options or {}).items()) or "the default options"
