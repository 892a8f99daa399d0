"""The parts of the benchmark, and what they share: networks, rows, the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial

from benchmarks.shared.budget import NO_TIME, Budget
from benchmarks.shared.correctness import Subject, confident_digits, judge
from benchmarks.shared.deadline import STOPPED, OutOfTimeError
from benchmarks.shared.report import Part, Report, Table
from benchmarks.shared.rows import Row, choose, every_row, short
from benchmarks.speed.ablation import ablation_part
from benchmarks.speed.apart import Forecast, measure_apart
from benchmarks.speed.cases import SCALES, Case, Size, cases
from benchmarks.speed.limits import limits_part
from benchmarks.speed.measure import measure_network
from benchmarks.speed.measurement import Effort, Measurement
from benchmarks.speed.memory import memory_part
from benchmarks.speed.network_table import network_table
from benchmarks.speed.one_way import start_afresh
from benchmarks.speed.scaling import early_stop_part, growth_part, scaling_part
from benchmarks.speed.sweep import sweep_part
from benchmarks.speed.updates import update_part
from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import reason

PARTS = ("correctness", "updates", "networks", "memory", "early_stop", "scaling", "growth", "ablation")
"""What is measured, in this order, unless some of it is asked for. Updates come before what many networks leave."""

COMPILING = 20.0
"""Seconds that a way which compiles is thought to take on its first network."""


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
    apart: bool


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
        self.budget = Budget(60 * settings.minutes, hard=settings.apart)
        self.forecast = Forecast(COMPILING)
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
        found = self._found(name, part)
        if "failure" not in found.record or name not in self.report.results:  # what was told on the way is kept
            self.report.add(name, found, show=name != "networks")  # each of those has been shown
        self._limits()
        start_afresh()

    def _found(self, name: str, part: Callable[[], Part]) -> Part:
        """What a part finds, or why it finds nothing. A hard budget ends it, but for the sweep, which has its own."""
        title, bound = name.replace("_", " "), self.budget.hard and name != "sweep"
        if bound and self.budget.left < 0:
            return _failed(title, NO_TIME)
        try:
            with self.budget.held() if bound else nullcontext():
                return part()
        except Exception as error:
            return _failed(title, reason(error))
        except OutOfTimeError:
            return _failed(title, STOPPED)

    def _limits(self, *, show: bool = False) -> None:
        self.report.add("limits", limits_part(self.report.results, gpu=self.device.type == "cuda"), show=show)

    def _chosen_rows(self, *, first: bool = True) -> tuple[Row, ...]:
        """The ways that are asked for, for the first network or for another."""
        return choose(self.rows, self.settings.rows, first=first)

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
        """How fast each way is; the networks are added one by one, or way by way."""
        tables: dict[str, Sequence[Table]] = {}
        records: dict[str, object] = {}
        whole = self.budget.share(0.79)

        def tell(case: Case, part: Part) -> Part:
            tables[case.key], records[case.key] = part.tables, part.record
            every = Part([table for found in tables.values() for table in found], records)
            self.report.add("networks", every, show=False)
            self._limits()
            return every

        every = Part([], records)
        for index, case in enumerate(self.cases):
            left = self.cases[index:]
            budget = whole.share(case.weight / sum(other.weight for other in left))
            every = tell(case, self._network(case, budget, partial(tell, case)))
            for table in tables[case.key]:
                table.show(self.report.console)
            start_afresh()
        return every

    def _network(self, case: Case, budget: Budget, tell: Callable[[Part], object]) -> Part:
        """One network in every way, each on its own or all in turn; what is known so far is told if it is stopped."""
        first, seed = case is self.cases[0], self.settings.seed
        rows = self._chosen_rows(first=first)
        told: list[Part] = []

        def keep(measured: Measurement) -> None:
            told[:] = [self._measured(measured)]
            tell(told[0])

        if budget.hard and budget.left <= 0:
            return _failed_network(case, NO_TIME)
        try:
            if self.settings.apart:
                return self._measured(self._apart(case, rows, budget, keep))
            return self._measured(
                measure_network(case, rows, self.effort, self.device, budget=budget, seed=seed, closer=first)
            )
        except Exception as error:
            return told[0] if told else _failed_network(case, reason(error))
        except OutOfTimeError:
            return told[0] if told else _failed_network(case, STOPPED)

    def _apart(
        self, case: Case, rows: Sequence[Row], budget: Budget, tell: Callable[[Measurement], None]
    ) -> Measurement:
        return measure_apart(
            case,
            rows,
            self.effort,
            self.device,
            budget=budget,
            seed=self.settings.seed,
            forecast=self.forecast,
            urgent=self._urgent(),
            tell=tell,
        )

    def _measured(self, measured: Measurement) -> Part:
        return Part([network_table(measured, self.verdicts, self.device)], measured.record())

    def _urgent(self) -> tuple[str, ...]:
        """What limits are held to: the default, and the recipe in the same dtype with its usual loss scale."""
        default = self.report.results["default"]
        return default["row"], f"recipe-{default['dtype']}-scaled"

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
        budget = Budget(60 * self.settings.minutes, hard=self.settings.apart)
        most, seed = self.scale.sweep, self.settings.seed
        return sweep_part(self.cases[0], self.effort, self.device, most=most, steps=3, budget=budget, seed=seed)


def _failed(name: str, why: str) -> Part:
    return Part([Table(name, ("failed",), [(why,)])], {"failure": why})


def _failed_network(case: Case, why: str) -> Part:
    return Part(_failed(case.title, why).tables, {"title": case.title, "rows": {}})
