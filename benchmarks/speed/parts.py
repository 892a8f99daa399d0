"""The parts of the benchmark, and what they share: networks, rows, the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from benchmarks.shared.correctness import Subject, confident_digits, judge
from benchmarks.shared.report import Part, Report, Table
from benchmarks.shared.rows import Row, choose, every_row, short
from benchmarks.shared.timing import Budget, reason
from benchmarks.speed.ablation import ablation_part
from benchmarks.speed.cases import SCALES, Case, Size, cases
from benchmarks.speed.limits import limits_part
from benchmarks.speed.measure import Effort, forget, measure_network
from benchmarks.speed.memory import memory_part
from benchmarks.speed.network_table import network_table
from benchmarks.speed.scaling import early_stop_part, growth_part, scaling_part
from benchmarks.speed.sweep import sweep_part
from benchmarks.speed.updates import update_part
from fastadv_adapters import FastAttackModel

PARTS = ("correctness", "updates", "networks", "memory", "early_stop", "scaling", "growth", "ablation")
"""What is measured, in this order, unless some of it is asked for. Updates come before what many networks leave."""


@dataclass(frozen=True)
class Settings:
    """What was asked for; see the options of the command."""

    size: Size
    networks: str
    rows: str
    parts: str
    steps: int
    repeats: int
    minutes: float
    seed: int
    keeps_freed_memory: bool


class Bench:
    """One run of the benchmark: a method for each part.

    Args:
        settings: what was asked for.
        chosen: the networks; the first is the one of which most is asked.
        report: where results go.
    """

    def __init__(self, settings: Settings, chosen: Sequence[Case], report: Report) -> None:
        self.settings, self.cases, self.report = settings, chosen, report
        self.device, self.scale = report.device, SCALES[settings.size]
        self.rows = every_row(self.device)
        self.budget = Budget(60 * settings.minutes)
        self.effort = Effort(
            steps=settings.steps,
            repeats=settings.repeats,
            closer=2 * settings.repeats,
            updates=5,
            matrix_size=self.scale.matrix_size,
            mebibytes=self.scale.mebibytes,
        )
        self.verdicts: dict[str, str] = {}
        fast = FastAttackModel(cases("tiny")[0].build().to(self.device))
        names = {"engine": fast.engine, "dtype": short(fast.dtype)}
        report.results["default"] = {**names, "row": f"ours-{names['engine']}-{names['dtype']}"}

    def run(self, names: Sequence[str]) -> None:
        """Run parts in turn. One that fails says why and the others go on; the limits are held to what there is."""
        for name in names:
            with self.report.console.status(name.replace("_", " ")):
                self._add(name, getattr(self, name))
        self._limits(show=True)

    def _add(self, name: str, part: Callable[[], Part]) -> None:
        try:
            found = part()
        except Exception as error:
            found = _failed(name.replace("_", " "), error)
        self.report.add(name, found, show=name != "networks")  # each of those has been shown
        self._limits()
        _start_afresh()

    def _limits(self, *, show: bool = False) -> None:
        self.report.add("limits", limits_part(self.report.results, gpu=self.device.type == "cuda"), show=show)

    def _chosen_rows(self) -> tuple[Row, ...]:
        """The ways that are asked for."""
        return choose(self.rows, self.settings.rows)

    @property
    def _smaller(self) -> Case:
        """The first network, on a processor at half its batch: for what needs many rounds."""
        first = self.cases[0]
        return first if self.device.type == "cuda" else replace(first, batch=max(first.batch // 2, 1))

    @cached_property
    def subject(self) -> Subject:
        """The confident digits network."""
        scale, seed = self.scale, self.settings.seed
        return confident_digits(self.device, images=scale.images, epochs=scale.epochs, seed=seed)

    def correctness(self) -> Part:
        """Whether each way is right."""
        rows, effort = self._chosen_rows(), self.effort
        budget = self.budget.share(0.15)
        judgement = judge(rows, self.subject, steps=effort.steps, seed=self.settings.seed, budget=budget)
        self.verdicts = {key: found.verdict for key, found in judgement.outcomes.items()}
        return Part([judgement.table("Right or wrong: the confident digits network")], judgement.record())

    def networks(self) -> Part:
        """How fast each way is; the networks are added one by one."""
        tables: list[Table] = []
        records: dict[str, object] = {}
        whole = self.budget.share(0.79)
        for index, case in enumerate(self.cases):
            left = self.cases[index:]
            part = self._network(case, whole.share(case.weight / sum(other.weight for other in left)))
            tables += part.tables
            records[case.key] = part.record
            self.report.add("networks", Part(tables, records), show=False)
            for table in part.tables:
                table.show(self.report.console)
            _start_afresh()
        return Part(tables, records)

    def _network(self, case: Case, budget: Budget) -> Part:
        rows, seed, closer = self._chosen_rows(), self.settings.seed, case is self.cases[0]
        try:
            measured = measure_network(case, rows, self.effort, self.device, budget=budget, seed=seed, closer=closer)
        except Exception as error:
            return Part(_failed(case.title, error).tables, {"title": case.title, "rows": {}})
        return Part([network_table(measured, self.verdicts, self.device)], measured.record())

    def memory(self) -> Part:
        """What is kept for the backward pass."""
        return memory_part(self.device, width=self.scale.memory_width, batch=2)

    def updates(self) -> Part:
        """What an update costs."""
        depth, width = self.scale.wide
        return update_part(self.device, depth=depth, width=width, repeats=3 * self.effort.repeats)

    def early_stop(self) -> Part:
        """What early stop saves."""
        return early_stop_part(self.subject, steps=self.scale.early_steps, seed=self.settings.seed)

    def scaling(self) -> Part:
        """Twice the steps, twice the batch."""
        budget = self.budget.share(0.4)
        return scaling_part(self._smaller, self.effort, self.device, budget=budget, seed=self.settings.seed)

    def growth(self) -> Part:
        """Whether memory grows."""
        return growth_part(self.device, rounds=self.scale.rounds, seed=self.settings.seed)

    def ablation(self) -> Part:
        """What each trick brings."""
        effort = replace(self.effort, repeats=min(self.effort.repeats, 4))
        return ablation_part(self._smaller, effort, self.device, budget=self.budget, seed=self.settings.seed)

    def sweep(self) -> Part:
        """Batch sizes; in time of its own."""
        budget = Budget(60 * self.settings.minutes)
        most, seed = self.scale.sweep, self.settings.seed
        return sweep_part(self.cases[0], self.effort, self.device, most=most, steps=3, budget=budget, seed=seed)


def _failed(name: str, error: Exception) -> Part:
    why = reason(error)
    return Part([Table(name, ("failed",), [(why,)])], {"failure": why})


def _start_afresh() -> None:
    """Nothing compiled or captured for one part is to be met by the next."""
    torch._dynamo.reset()
    forget()
