"""The outcomes that are there, put together: per case, per attack, in words."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.matrix.cases import Case, Row
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

    def second_pair(
        self, row: Row, case: Case, subject: str, dtype: str
    ) -> tuple[list[Outcome | None], list[Outcome | None]]:
        """The same at a second look: on all images, over all seeds."""
        plain, fast = (
            self.outcomes(row, case, subject, way, self.plan.images, case.second_seeds) for way in (PLAIN, dtype)
        )
        return plain, fast

    def first_verdict(self, row: Row, case: Case, subject: str, dtype: str) -> Verdict:
        """How the fast model did in one case on one network, by the seeds that are run at first."""
        return verdict(case.rule, *self.pair(row, case, subject, dtype), self.plan.count(dtype))

    def verdict(self, row: Row, case: Case, subject: str, dtype: str) -> Verdict:
        """The same, after a second look where the first one made it weaker."""
        first = self.first_verdict(row, case, subject, dtype)
        if first != "weaker":
            return first
        second = over_seeds(case.rule, *self.second_pair(row, case, subject, dtype), self.plan.images)
        return first if second == "not run" else second

    def second_look(self) -> Iterator[tuple[Cell, Row, Case]]:
        """The cells for it, of what has been run so far; some may have been run."""
        for row in self.plan.rows():
            for case in row.cases:
                for subject, dtype in itertools.product(RECIPES, self.plan.dtypes):
                    if self.first_verdict(row, case, subject, dtype) == "weaker":
                        for way in (PLAIN, dtype):
                            cells = cells_of(row, case, subject, way, self.plan.images, case.second_seeds)
                            yield from ((cell, row, case) for cell in cells)

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
