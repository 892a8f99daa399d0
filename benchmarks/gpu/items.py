"""What a stage has found, item by item: each is tried, timed, kept at once, and stopped when the time is up."""

import json
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.shared.budget import NO_TIME, Budget
from benchmarks.shared.deadline import STOPPED, OutOfTimeError
from benchmarks.shared.report import Part, Report, Table
from benchmarks.speed.cases import Case, Size, cases
from benchmarks.speed.one_way import start_afresh

_LINES = 12  # of a traceback that are kept
_WARNINGS = 4  # that are kept of one item


class Items:
    """The items of one stage.

    Args:
        stage: its name.
        report: where they are written, after every item.
        budget: for all stages; an item that takes longer is stopped.
        size: of the networks.
    """

    def __init__(self, stage: str, report: Report, budget: Budget, size: Size) -> None:
        self.stage, self.report, self.budget, self.size = stage, report, budget, size
        self.records: dict[str, dict[str, Any]] = {}

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.report.device

    @property
    def cuda(self) -> bool:
        """Whether that is a GPU; elsewhere stages are rehearsed alone."""
        return self.device.type == "cuda"

    @property
    def tiny(self) -> bool:
        """Whether sizes are those of a rehearsal."""
        return self.size == "tiny"

    @property
    def cases(self) -> list[Case]:
        """The networks for items that take long: in a rehearsal one of each kind."""
        return [case for case in cases(self.size) if not self.tiny or case.key in ("wrn", "vit")]

    def add(self, key: str, work: Callable[[], Mapping[str, Any]], *, need: float = 5.0) -> None:
        """Try an item and write what it finds, or why it finds nothing.

        Args:
            key: its name.
            work: finds numbers and texts by name.
            need: seconds that must be left for it to be begun.
        """
        start = time.monotonic()
        record = self._tried(work) if self.budget.left >= need else {"failure": NO_TIME}
        self.records[key] = {**record, "seconds": round(time.monotonic() - start, 2)}
        self.report.console.print(f"{self.stage}, {key}: {_told(self.records[key])}", markup=False, highlight=False)
        self.write()
        start_afresh()

    def _tried(self, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with self.budget.held():
                    record: dict[str, Any] = {"found": dict(work())}
            except Exception as error:
                at = traceback.format_exc().splitlines()[-_LINES:]
                record = {"failure": f"{type(error).__name__}: {error}"[:600], "at": at}
            except OutOfTimeError:
                record = {"failure": STOPPED}
        told = sorted({str(warning.message)[:160] for warning in caught})
        return {**record, "warnings": told[:_WARNINGS]} if told else record

    def write(self) -> None:
        """Write everything that is known."""
        rows = [(key, _told(record), f"{record['seconds']:g}") for key, record in self.records.items()]
        table = Table(f"Stage {self.stage}", ("item", "found", "seconds"), rows)
        self.report.add("items", Part([table], self.records), show=False)


def _told(record: Mapping[str, Any]) -> str:
    """An item in a line: its plain values, for lists are in JSON alone."""
    found = record.get("found")
    if found is None:
        return str(record["failure"]).replace("|", "/").splitlines()[0]
    plain = {key: value for key, value in found.items() if not isinstance(value, (list, dict))}
    return ", ".join(f"{key} {_short(value)}" for key, value in plain.items())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value).strip('"')
