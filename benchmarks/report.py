"""What a benchmark hands back: tables on the terminal, the same in Markdown, and all numbers in JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.timing import Timing, describe_device, versions

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
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def show(self, console: Console) -> None:
        """Print it on the terminal."""
        drawn = RichTable(title=self.title, caption=self.note or None)
        for index, column in enumerate(self.columns):
            drawn.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            drawn.add_row(*row)
        console.print(drawn)

    def markdown(self) -> str:
        """The same as Markdown."""
        rule = [":--" if index == 0 else "--:" for index in range(len(self.columns))]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        note = [self.note, ""] if self.note else []
        return "\n".join([f"## {self.title}", "", *lines, "", *note])


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


def deliver(
    name: str,
    *,
    title: str,
    tables: Sequence[Table],
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    device: torch.device,
    out: Path,
    console: Console,
) -> None:
    """Print the tables, and write `out/name.json` and `out/name.md`, both with device, versions and settings."""
    hardware, software = describe_device(device), versions()
    record = {"device": hardware, "versions": software, "settings": dict(settings), "results": dict(results)}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    told = [
        f"# {title}",
        "",
        f"Made by `python -m benchmarks.{name}`; all numbers are in `{name}.json`.",
        "",
        *(
            f"- {head}: " + ", ".join(f"{key} {value}" for key, value in described.items())
            for head, described in (("device", hardware), ("versions", software), ("settings", settings))
        ),
        "",
    ]
    (out / f"{name}.md").write_text("\n".join(told + [table.markdown() for table in tables]))
    for table in tables:
        table.show(console)
    console.print(f"written: {out / name}.json, {out / name}.md")
