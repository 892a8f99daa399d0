"""A comparison as a table, a column for each way, on the terminal and in a notebook; and what is being done."""

import html
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..modules import accept_flag, need
from .row import Row

LEGEND = (
    "Times as fast: median and quartiles of pairs with the plain model, warm-up apart. Cosine (median, least) and "
    "signs are of gradients, with {reference}. Robust accuracy is judged by the plain model; images differ if their "
    "outcome is another than after the plain attack."
)


@contextmanager
def telling(wanted: bool) -> Iterator[Callable[[str], None]]:
    """A function that says what is being done, in one line of the terminal; nothing if there is none, or no rich."""
    accept_flag("progress", wanted)
    if wanted and sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console

        with Console(stderr=True).status("compare") as status:
            yield status.update
    else:
        yield lambda what: None


def lines_of(rows: Sequence[Row], recommended: str | None) -> list[list[str]]:
    """The table as text: a head with the name of each way, then what was found, a line each."""
    names = [f"{row.name}\n(recommended)" if row.name == recommended else row.name for row in rows]
    columns = [_column(row) for row in rows]
    heads = list(columns[0])
    return [["", *names], *([head, *(column.get(head, "") for column in columns)] for head in heads)]


def _column(row: Row) -> dict[str, str]:
    if row.failure is not None:
        return {"runs in": row.runs_in, "faithful": f"failed: {row.failure}"}
    lower, upper = row.spread
    least = min((c for c in row.cosines if c == c), default=float("nan"))
    return {
        "runs in": row.runs_in,
        "times as fast": f"{row.ratio:.2f} ({lower:.2f}-{upper:.2f})" if row.options is not None else "1",
        "attack, ms": f"{1e3 * row.median_seconds:.4g}",
        "first call, s": f"{row.first_seconds:.2f}",
        "kB kept per image": "" if row.kept_bytes is None else f"{row.kept_bytes / 1e3:.4g}",
        "error of logits": f"{row.logits_error:.1e}",
        "cosine": f"{row.cosine:.4f}, {least:.3f}",
        "signs agree": f"{row.signs:.1%}",
        "zero gradients": str(row.zero),
        "not finite": str(row.spoilt),
        "robust accuracy": f"{row.robust_accuracy:.1%}",
        "images differ": str(row.differ),
        "faithful": "yes" if row.faithful else "NO",
    }


def print_table(title: str, lines: Sequence[Sequence[str]], legend: str, last: Sequence[str], file: Any) -> None:
    """Print the table with rich, and these lines below."""
    need("rich", extra="evaluate")
    from rich.console import Console
    from rich.table import Table

    head, *body = lines
    table = Table(title=title)
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left")
    for line in body:
        table.add_row(*line)
    console = Console(file=file)
    console.print(table)
    console.print(legend, style="dim", markup=False, highlight=False)
    for text in last:
        console.print(text, markup=False, highlight=False)


def as_html(title: str, lines: Sequence[Sequence[str]], legend: str, last: Sequence[str]) -> str:
    """The same as HTML, escaped."""
    head, *body = ([html.escape(text).replace("\n", "<br>") for text in line] for line in lines)
    rows = "".join(f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in body)
    return (
        f"<p><b>{html.escape(title)}</b></p>"
        f"<table><thead><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr></thead><tbody>{rows}</tbody></table>"
        f"{''.join(f'<p>{html.escape(text)}</p>' for text in last)}<p><small>{html.escape(legend)}</small></p>"
    )
