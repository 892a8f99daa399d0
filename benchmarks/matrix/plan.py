"""Which cells there are, and the order in which they are run."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.matrix import foolbox_rows, torchattacks_rows
from benchmarks.matrix.cases import Case, Row
from benchmarks.matrix.cells import DTYPES, PLAIN, Cell
from benchmarks.matrix.subjects import RECIPES

ROWS: tuple[Row, ...] = (*torchattacks_rows.ROWS, *foolbox_rows.ROWS)
HALF = ("float16", "bfloat16")
"""Ways that are run on a quarter of the images, for they are slow on a CPU."""


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        images: in float32; half precision takes a quarter of them.
        dtypes: of the fast model.
        attacks: names; none for all.
    """

    images: int
    dtypes: tuple[str, ...] = tuple(DTYPES)
    attacks: tuple[str, ...] = ()

    def count(self, way: str) -> int:
        """How many images are attacked in this way."""
        return max(1, self.images // 4) if way in HALF else self.images

    def rows(self) -> Iterator[Row]:
        """The attacks that are asked for."""
        return (row for row in ROWS if not self.attacks or row.attack in self.attacks)

    def cells(self) -> Iterator[tuple[Cell, Row, Case]]:
        """All cells, attack by attack; the plain model is run on as many images as each fast one."""
        for row in self.rows():
            for case in row.cases:
                for name in RECIPES:
                    yield from ((cell, row, case) for cell in self._cells_of(row, case, name))

    def _cells_of(self, row: Row, case: Case, subject: str) -> Iterator[Cell]:
        counts = sorted({self.count(way) for way in self.dtypes}, reverse=True)
        ways = [(PLAIN, count) for count in counts] + [(way, self.count(way)) for way in self.dtypes]
        for way, count in ways:
            yield from cells_of(row, case, subject, way, count)


def cells_of(
    row: Row, case: Case, subject: str, way: str, count: int, seeds: Iterable[int] | None = None
) -> Sequence[Cell]:
    """The cells of one way, one per seed; of the first seed alone unless told otherwise."""
    seeds = range(1) if seeds is None else seeds
    return [Cell(subject, row.library, row.attack, case.label, way, count, seed) for seed in seeds]
