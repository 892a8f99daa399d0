"""What a benchmark hands back: tables on the terminal, the same in Markdown, and all numbers in JSON."""

import json
import os
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from fastadv_adapters.comparison import Timing, describe_device, versions

OUT = Path("docs/benchmarks")
"""Where results are kept unless told otherwise."""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: what is compared, and at which size.
        columns: heads; the first column is set flush left, the others flush right.
        rows: one text per column each.
        note: a line below, for what a reader must know to read it right.
        legend: more of it, behind the note; if several tables of a page have the same, it stands once, above them.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    legend: str = ""

    def show(self, console: Console) -> None:
        """Print it on the terminal."""
        drawn = RichTable(title=self.title, caption=escape(self._told()) or None)
        for index, column in enumerate(self.columns):
            drawn.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            drawn.add_row(*row)
        console.print(drawn)

    def markdown(self, *, above: Collection[str] = ()) -> str:
        """The same as Markdown, without a legend that stands above the tables."""
        rule = [":--" if index == 0 else "--:" for index in range(len(self.columns))]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        told = self._told(above)
        note = [told, ""] if told else []
        return "\n".join([f"## {self.title}", "", *lines, "", *note])

    def _told(self, above: Collection[str] = ()) -> str:
        return " ".join(text for text in (self.note, self.legend) if text and text not in above)


@dataclass(frozen=True)
class Part:
    """What one part of a benchmark has found.

    Attributes:
        tables: for people.
        record: all numbers, as JSON has them.
    """

    tables: Sequence[Table]
    record: Any


@dataclass
class Report:
    """The results of one command. They are written after every part, so a run that is broken off keeps what it has.

    A file is replaced as a whole: a run that is killed while it writes leaves the file of before.

    Attributes:
        name: of the files, without their endings.
        title: of the page.
        command: what makes it.
        settings: what was asked for.
        device: where it runs.
        out: folder of the files.
        console: where tables are printed.
        first: key of the part that stands first on the page, if it is there.
        results: all numbers, by key.
        picture: a file in the same folder, shown on the page.
        explained: a line at the top, on where the columns are explained.
    """

    name: str
    title: str
    command: str
    settings: Mapping[str, Any]
    device: torch.device
    out: Path
    console: Console
    first: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    picture: Path | None = None
    explained: str = ""

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._heads: dict[str, Mapping[str, Any]] = {"device": describe_device(self.device), "versions": versions()}
        self._heads["settings"] = dict(self.settings)
        self._tables: dict[str, Sequence[Table]] = {}

    def add(self, key: str, part: Part, *, show: bool = True) -> None:
        """Take a part in, or in the place of an earlier one of this key, and write everything; print it to `show`."""
        self.results[key], self._tables[key] = part.record, part.tables
        for table in part.tables if show else ():
            table.show(self.console)
        self.write()

    def write(self) -> None:
        """Write `out/name.json` and `out/name.md`, both with device, versions and settings."""
        self.out.mkdir(parents=True, exist_ok=True)
        record = {**self._heads, "results": self.results}
        self._replace("json", json.dumps(record, indent=2) + "\n")
        heads = [f"- {head}: " + ", ".join(f"{k} {v}" for k, v in told.items()) for head, told in self._heads.items()]
        picture = [f"![{self.title}]({self.picture.name})", ""] if self.picture else []
        made = f"Made by `{self.command}`; all numbers are in `{self.name}.json`."
        made += f" {self.explained}" if self.explained else ""
        keys = sorted(self._tables, key=lambda key: key != self.first)
        tables = [table for key in keys for table in self._tables[key]]
        counts = Counter(table.legend for table in tables if table.legend)
        shared = [legend for legend, count in counts.items() if count > 1]
        legends = [line for legend in shared for line in (legend, "")]
        shown = [table.markdown(above=shared) for table in tables]
        page = [f"# {self.title}", "", made, "", *heads, "", *picture, *legends, *shown]
        self._replace("md", "\n".join(page))

    def _replace(self, ending: str, text: str) -> None:
        beside = self.path(f"{ending}.new")
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path(ending))

    def path(self, ending: str) -> Path:
        """One of the files."""
        return self.out / f"{self.name}.{ending}"

    def finish(self) -> None:
        """Say how long it took, and where the results are."""
        self._heads["took"] = {"minutes": round((time.monotonic() - self._began) / 60, 1)}
        self.write()
        self.console.print(f"written: {self.path('json')}, {self.path('md')}")


def milliseconds(timing: Timing) -> str:
    """Median and quartiles as text, in milliseconds."""
    lower, upper = timing.quartiles
    return f"{1e3 * timing.median:.4g} ({1e3 * lower:.4g} to {1e3 * upper:.4g})"


def timing_record(timing: Timing) -> dict[str, Any]:
    """All that was measured of one way, in seconds."""
    return {
        "median_s": timing.median,
        "quartiles_s": timing.quartiles,
        "warmup_s": timing.warmup_seconds,
        "all_s": timing.seconds,
    }
