"""The way of the samples: clean decisions, one attack after the other, and into the files."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comparison import MARGIN, extent, reach
from ..modules import widest_on
from .confirming import SIZE
from .data import hash_of
from .planning import Plan
from .rows import CLEAN, Case, Row
from .sharing import Count, Sharing
from .stages import Setting, Stage
from .store import Finished

LATE = 5.0
"""After so many seconds samples are judged and written even if they are few."""


@dataclass
class Sink:
    """Where finished samples end.

    Attributes:
        sharing: is told what is finished.
        write: puts samples on disk, or wherever they are kept.
        notice: is told what all processes have done.
        callback: is given each row once it is written.
    """

    sharing: Sharing
    write: Callable[[list[Finished]], None]
    notice: Callable[[Count], None]
    callback: Callable[[Row], object] | None

    def __post_init__(self) -> None:
        self._held: list[Finished] = []
        self._since = time.monotonic()

    def begin(self, count: int) -> None:
        """So many samples are on their way."""
        self.sharing.begin(count)

    def finish(self, row: Row, clean: Tensor, adversarial: Tensor | None = None) -> None:
        """Take a sample; sooner or later it is written."""
        if not self._held:
            self._since = time.monotonic()
        self._held.append(Finished(row, clean, adversarial))
        if len(self._held) >= SIZE or time.monotonic() - self._since > LATE:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        held, self._held = self._held, []
        if not held:
            return
        self.write(held)
        rows = [finished.row for finished in held]
        self.notice(self.sharing.done([row.index for row in rows], sum(row.broken_by is not None for row in rows)))
        if self.callback:
            for row in rows:
                self.callback(row)


def run(chunks: Iterable[list[int]], plan: Plan, sink: Sink) -> None:
    """Attack the samples of all chunks, each by one attack after the other until it is broken."""
    cases: Iterator[Case] = itertools.chain.from_iterable(_clean(index, plan, sink) for index in chunks)
    for stage in plan.stages:
        cases = _standing(stage.run(cases), stage, sink)
    for case in cases:
        sink.finish(case.finished(), case.x)
    sink.flush()


def _clean(index: list[int], plan: Plan, sink: Sink) -> Iterator[Case]:
    """Samples that the plain model classifies as labelled; the others are finished."""
    judge, hashes = plan.setting.judge, plan.seen.hashes
    sink.begin(len(index))
    x, y = plan.samples.read(index)
    if [hash_of(image) for image in x] != [hashes[i] for i in index]:
        raise ValueError(
            f"expected data that gives the same images each time, got others in samples {index[0]} to {index[-1]}: "
            f"leave random transforms out"
        )
    x, y = x.detach().to(judge.device), y.to(judge.device, torch.int64)
    verdicts = judge.verdicts(x, y, "clean", index[0])
    order = verdicts.logits.nan_to_num(nan=-torch.inf).argsort(stable=True, dim=1, descending=True)
    others = order[order != y[:, None]].view(len(y), -1)  # the label is no rival of itself
    values = (t.tolist() for t in (y, verdicts.predictions, others, verdicts.adversarial, verdicts.borderline))
    for i, image, label, prediction, rivals, wrong, near in zip(index, x, *values, strict=True):
        case = Case(i, hashes[i], image, label, prediction, rivals)
        if wrong:
            case.borderline = near
            sink.finish(case.finished(CLEAN, 0.0), image)
        else:
            yield case


def _standing(source: Iterator[tuple[Case, Tensor, bool]], stage: Stage, sink: Sink) -> Iterator[Case]:
    """Samples that stand after an attack; the plain model judges all candidates in batches of one size."""
    while judged := list(_for_a_while(source)):
        cases = [case for case, _, _ in judged]
        found = torch.stack([candidate for _, candidate, _ in judged])
        x = torch.stack([case.x for case in cases])
        y = torch.tensor([case.label for case in cases], device=x.device)
        verdicts = stage.setting.judge.verdicts(found, y, stage.name, stage.eps, cases[0].index)
        distances = _lengths(found, x).tolist()
        valid = _within(found, x, stage.eps, stage.setting)
        inside, broken = valid.tolist(), (verdicts.adversarial & valid).tolist()
        predictions, near = verdicts.predictions.tolist(), (verdicts.borderline & valid).tolist()
        for i, (case, candidate, claimed) in enumerate(judged):
            if inside[i]:
                case.denied += claimed and not broken[i]
            else:
                case.outside.append(stage.name)
            if broken[i]:
                case.borderline = near[i]
                row = case.finished(stage.name, stage.eps, predictions[i], distances[i])
                sink.finish(row, case.x, candidate)
            else:
                case.borderline |= near[i]
                yield case
        sink.flush()


def _for_a_while(source: Iterator[tuple[Case, Tensor, bool]]) -> Iterator[tuple[Case, Tensor, bool]]:
    """As many as the judge is given at once, or fewer if they come slowly."""
    begun = time.monotonic()
    for item in itertools.islice(source, SIZE):
        yield item
        if time.monotonic() - begun > LATE:
            return


def _lengths(found: Tensor, x: Tensor, *, less_rounding: bool = False) -> Tensor:
    """Lengths of changes of x (N, ...) in the L-infinity, L2 and L1 norm, (N, 3), in float64 where there is one.

    ``less_rounding`` takes each entry for as near to that of x as it may have been before it was rounded.
    """
    wide = widest_on(x.device)
    change = (found.to(wide) - x.to(wide)).abs().flatten(1)
    if less_rounding:
        change = (change - _half_units(found).to(wide).flatten(1)).clamp(min=0)
    return torch.stack([torch.linalg.vector_norm(change, order, 1) for order in (torch.inf, 2, 1)], 1)


def _half_units(found: Tensor) -> Tensor:
    """How far rounding to its dtype may have moved each entry: half a unit in its last place."""
    limits, values = torch.finfo(found.dtype), found.to(widest_on(found.device))
    exponents = torch.frexp(values.abs().clamp(min=limits.tiny)).exponent
    return torch.ldexp(torch.full_like(values, limits.eps / 4), exponents)  # of [0.5, 1): a unit is half of eps


def _within(found: Tensor, x: Tensor, eps: float, setting: Setting) -> Tensor:
    """Which candidates lie within the budget and the bounds, up to rounding."""
    lower, upper = setting.bounds
    slack = MARGIN * extent(setting.bounds)
    length = _lengths(found, x, less_rounding=True)[:, ("linf", "l2", "l1").index(setting.norm)]
    flat = found.flatten(1)
    inside = (flat >= lower - slack).all(1) & (flat <= upper + slack).all(1)
    known = float(torch.tensor(eps, dtype=found.dtype, device="cpu"))  # all that an attack in this dtype knows of eps
    return inside & (length <= reach(max(eps, known), setting.bounds))
