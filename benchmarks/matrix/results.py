"""The outcomes that are there, put together: per case, per attack, in words."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.matrix.cases import LOOKS, Case, Row
from benchmarks.matrix.cells import DTYPES, PLAIN, Cell, Outcome, read
from benchmarks.matrix.plan import Plan, cells_of
from benchmarks.matrix.subjects import RECIPES
from benchmarks.matrix.verdicts import Verdict, over_seeds, verdict, worst


@dataclass(frozen=True)
class Results:
    """All that has been run.

    Attributes:
        plan: how many images in which way.
        cache: where outcomes are kept.
    """

    plan: Plan
    cache: Path

    def outcomes(
        self, row: Row, case: Case, subject: str, way: str, count: int, seeds: Iterable[int] | None = None
    ) -> list[Outcome | None]:
        """One per seed, None for what has not been run."""
        return [read(cell, case, self.cache) for cell in cells_of(row, case, subject, way, count, seeds)]

    def pair(self, row: Row, case: Case, subject: str, dtype: str) -> tuple[list[Outcome | None], list[Outcome | None]]:
        """The plain runs and the fast ones on the same images, at the first look."""
        count = self.plan.count(dtype)
        plain, fast = (self.outcomes(row, case, subject, way, count) for way in (PLAIN, dtype))
        return plain, fast

    def looks(
        self, row: Row, case: Case, subject: str, dtype: str
    ) -> Iterator[tuple[range, list[Outcome | None], list[Outcome | None]]]:
        """The same at a second look and a third: on all images, over ever more seeds."""
        for seeds in LOOKS:
            plain, fast = (self.outcomes(row, case, subject, way, self.plan.images, seeds) for way in (PLAIN, dtype))
            yield seeds, plain, fast

    def first_verdict(self, row: Row, case: Case, subject: str, dtype: str) -> Verdict:
        """How the fast model did in one case on one network, by the seeds that are run at first."""
        return verdict(case.rule, *self.pair(row, case, subject, dtype), self.plan.count(dtype))

    def verdict(self, row: Row, case: Case, subject: str, dtype: str) -> Verdict:
        """The same, after further looks while the one before made it weaker."""
        return self.last_look(row, case, subject, dtype)[0]

    def last_look(
        self, row: Row, case: Case, subject: str, dtype: str
    ) -> tuple[Verdict, list[Outcome | None], list[Outcome | None]]:
        """The verdict of the last look that was made, and its plain and fast runs."""
        found = self.first_verdict(row, case, subject, dtype), *self.pair(row, case, subject, dtype)
        for _, plain, fast in self.looks(row, case, subject, dtype):
            word = over_seeds(case.rule, plain, fast, self.plan.images)
            if found[0] != "weaker" or word == "not run":
                break
            found = word, plain, fast
        return found

    def next_looks(self) -> Iterator[tuple[Cell, Row, Case]]:
        """The cells for the next look at what is weaker so far; some may have been run."""
        for row in self.plan.rows():
            for case in row.cases:
                for subject, dtype in itertools.product(RECIPES, self.plan.dtypes):
                    if self.verdict(row, case, subject, dtype) != "weaker":
                        continue
                    for seeds, plain, fast in self.looks(row, case, subject, dtype):
                        if None in plain or None in fast:
                            for way in (PLAIN, dtype):
                                cells = cells_of(row, case, subject, way, self.plan.images, seeds)
                                yield from ((cell, row, case) for cell in cells)
                            break

    def verdicts(self, row: Row, dtype: str) -> list[tuple[Case, str, Verdict]]:
        """The same for all cases of an attack, with case and network."""
        return [(c, name, self.verdict(row, c, name, dtype)) for c in row.cases for name in RECIPES]

    def worst(self, row: Row, dtype: str) -> Verdict:
        """One word for an attack."""
        return worst(word for _, _, word in self.verdicts(row, dtype))

    def fast_outcomes(self, row: Row) -> Iterator[tuple[Case, Outcome]]:
        """Every outcome of an attack on a fast model."""
        for case in row.cases:
            for subject in RECIPES:
                for dtype in DTYPES:
                    found = self.outcomes(row, case, subject, dtype, self.plan.count(dtype))
                    yield from ((case, outcome) for outcome in found if outcome)
