"""What is measured on one network, and with how much effort."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.shared.report import timing_record
from benchmarks.shared.rows import PLAIN, Row, short
from benchmarks.speed.cases import Case
from benchmarks.speed.floor import Rates, Work
from fastadv_adapters.comparison import Timing


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        steps: of projected gradient descent.
        repeats: timed rounds, at most.
        closer: rounds more, at most, for the ways that are nearly as fast as the fastest, where that is asked for.
        updates: timed rounds of the updates.
        matrix_size: rows and columns of the matrices whose products are the yardstick.
        mebibytes: size of the copy that is the other.
    """

    steps: int
    repeats: int
    closer: int
    updates: int
    matrix_size: int
    mebibytes: int


@dataclass
class Found:
    """What was measured of one way; None for what was not, or does not apply.

    Attributes:
        first_s: seconds of building it and of the first attack: compiling, capturing, looking for algorithms.
        timing: of later attacks.
        update: of bringing it up to date after all weights have changed.
        kept: bytes per image that a forward pass keeps for the backward pass; not told on a GPU.
        first_peak: most bytes that tensors held during the first attack, beyond network and batch; on a GPU alone.
        peak: the same of a later attack. A CUDA graph has its memory already then.
        failure: why it could not be measured.
        update_failure: why it could not be updated.
    """

    first_s: float | None = None
    timing: Timing | None = None
    update: Timing | None = None
    kept: float | None = None
    first_peak: int | None = None
    peak: int | None = None
    failure: str | None = None
    update_failure: str | None = None

    @property
    def memory(self) -> float | None:
        """Bytes per batch to compare by: the highest peak on a GPU, else what is kept."""
        peaks = [peak for peak in (self.first_peak, self.peak) if peak is not None]
        return max(peaks) if peaks else self.kept


@dataclass(frozen=True)
class Measurement:
    """All ways on one network.

    Attributes:
        case: the network.
        rows: the ways.
        found: by their keys; not all of them, while it is still measured.
        work: of one step.
        rates: of the device, in turn with the attacks.
        steps: of an attack.
        rounds: timed rounds that were made of each way, at least.
        closer: how many more for the ways that are nearly as fast as the fastest.
        apart: whether the ways were measured one after the other, and not in turn.
    """

    case: Case
    rows: Sequence[Row]
    found: dict[str, Found]
    work: Work
    rates: Rates
    steps: int
    rounds: int
    closer: int
    apart: bool = False

    def median(self, key: str) -> float | None:
        """Median seconds of an attack in this way."""
        timing = self.found[key].timing if key in self.found else None
        return timing.median if timing else None

    def record(self) -> dict[str, Any]:
        """All numbers."""
        dtypes = self.rates.flops_per_s
        return {
            "title": self.case.title,
            "batch": self.case.batch,
            "image_x_steps": self.case.batch * self.steps,
            "flops_per_step": self.work.flops,
            "matrix_elements_per_step": self.work.elements,
            "matrix_flops_per_s": {short(d): rate for d, rate in dtypes.items()},
            "copy_bytes_per_s": self.rates.bytes_per_s,
            "floor_s": {short(d): self.steps * self.rates.floor(self.work, d) for d in dtypes},
            "apart": self.apart,
            "rows": {row.key: self._row(row) for row in self.rows if row.key in self.found},
        }

    def _row(self, row: Row) -> dict[str, Any]:
        found = self.found[row.key]
        seconds, plain = self.median(row.key), self.median(PLAIN)
        told: dict[str, Any] = {"label": row.label, "dtype": short(row.dtype), "ours": row.ours}
        if found.failure or seconds is None:
            return {**told, "failure": found.failure}
        rate = self.rates.flops_per_s[row.dtype]
        return {
            **told,
            **timing_record(found.timing or Timing((seconds,))),
            "ratio_to_plain": plain / seconds if plain else None,
            "share_of_matrix_peak": self.steps * self.work.flops / rate / seconds,
            "share_of_floor": self.steps * self.rates.floor(self.work, row.dtype) / seconds,
            "first_s": found.first_s,
            "update": timing_record(found.update) if found.update else None,
            "update_failure": found.update_failure,
            "bytes_kept_per_image": found.kept,
            "first_peak_bytes": found.first_peak,
            "peak_bytes": found.peak,
            "memory": found.memory,
        }
