"""Passes without gradient: a folded network in float32 answers, and the twin judges the samples that are too near.

Folding changes logits in their last digits (by 2e-7 to 4e-6 of the sample's largest in the networks of
`python -m benchmarks.speed.people`). A verdict can depend on that only if the two largest logits of a sample are as
near; such samples are run through the twin as well. How far logits are off is looked at in the first pass of each kind,
in one of many later, and whenever the twin judges.

Where an operator jumps, a difference in the last digit may become one of any size: a model with such an operator stays
with the twin, and so does one that keeps a state, for each network would have a state of its own, or draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..boundary import Crossing, Engine, Packed, Run, UnbalancedFoldError
from ..modules import HALF, Precision, is_out_of_memory, number_of_samples, random_state_kept
from .fast import Fast
from .kinds import remember
from .samples import batched
from .schedule import PASSES
from .steadiness import watching_steadiness

NEAR = 1e-5
"""If its two largest logits are nearer than this share of the largest absolute one, the twin judges a sample."""

TIMES = 8
"""Or nearer than so many times what logits were seen to be off. Twice would do if that were the most there is."""

OFF = 1e-4
"""What is off by more is not rounding: the twin answers."""


class Twinned(Protocol):
    """The networks, as far as they are needed here."""

    precision: Precision
    updates: int

    @property
    def twin(self) -> Any:
        """Runs the wrapped model's own weights."""

    @property
    def fast(self) -> Engine:
        """What runs the fast network."""

    @property
    def folded(self) -> Any:
        """The fast network."""

    def network_in(self, dtype: torch.dtype) -> Fast:
        """The fast network in this precision."""


@dataclass
class Trust:
    """What is known of the folded network's values in one kind of call.

    Attributes:
        off: by how much they have been off at most whenever that was looked at, as a share of the largest logit.
        samples: how many there were at most in a look.
        passes: since the last look; None before the first.
        updates: how many updates the model had seen at the last look.
    """

    off: float = 0.0
    samples: int = 0
    passes: int | None = None
    updates: int = 0

    @property
    def good(self) -> bool:
        """Whether that is rounding."""
        return self.off <= OFF

    @property
    def near(self) -> float:
        """For samples whose two largest logits are nearer than this share of the largest one, the twin is asked."""
        return max(NEAR, TIMES * self.off)

    def add(self, off: float) -> None:
        """Take down what was seen."""
        self.off = max(self.off, off)

    def is_due(self, samples: int, updates: int) -> bool:
        """Whether this pass, of so many samples, is to be looked at; counts it."""
        if self.passes is None:
            return True
        self.passes += 1
        seen = samples < 2 * self.samples  # code may branch on how many there are
        return not seen or self.passes >= (PASSES if updates == self.updates else PASSES // 2)

    def looked(self, samples: int, updates: int) -> None:
        """A look is over; one that was broken off, by an error of the model's own say, is none."""
        self.samples, self.passes, self.updates = max(samples, self.samples), 0, updates


class Judges:
    """Says what runs passes without gradient.

    Args:
        networks: as they have just been made. Folding pays on a processor; elsewhere that was not measured.
    """

    def __init__(self, networks: Twinned) -> None:
        precision, native = networks.precision, networks.twin.engine.native
        taken_out = any(done.startswith(("folded", "frozen")) for done in networks.folded.report.values())
        eager = precision.device.type == "cpu" and networks.fast.name == "eager"
        self._pays = taken_out and eager and native == torch.float32 and precision.dtype in (*HALF, torch.float32)
        self._trust: dict[Any, Trust] = {}

    def run(self, networks: Twinned, key: Any, arguments: Packed) -> Run:
        """The run of a call of this kind."""
        twin: Run = networks.twin.engine.bind(arguments)
        if not self._pays:
            return twin
        trust = self._trust.get(key) or remember(self._trust, key, Trust())
        if not trust.good:
            return twin
        return Judged(twin, networks.network_in(torch.float32).engine.bind(arguments), trust, networks)


class Judged:
    """One call without gradient; see :class:`Run`."""

    def __init__(self, twin: Run, folded: Run, trust: Trust, networks: Twinned) -> None:
        self._twin, self._folded, self._trust, self._networks = twin, folded, trust, networks

    def __call__(self, tensors: Sequence[Tensor]) -> Packed:
        """The folded network's output, but the twin's for samples that are too near."""
        samples = number_of_samples(tensors)
        if not samples:
            return self._twin(tensors)
        if self._trust.is_due(samples, self._networks.updates):
            output = self._look(tensors, samples)
            self._trust.looked(samples, self._networks.updates)
            if not self._trust.good:
                return output
        folded = self._try(tensors)
        logits = None if folded is None else logits_of(folded, samples)
        if folded is None or logits is None:
            return self._distrust(tensors)
        near = are_near(logits, self._trust.near)
        if not bool(near.any()):
            return folded
        index = near.nonzero().flatten()
        exact = logits_of(self._twin(self._rows(tensors, index)), len(index))
        if exact is None:
            return self._distrust(tensors)
        self._trust.add(most_off_by(logits.index_select(0, index), exact))
        if not self._trust.good:
            return self._twin(tensors)
        return folded.holding([logits.index_copy(0, index, exact)])

    def values(self, tensors: Sequence[Tensor], crossing: Crossing) -> Packed:
        """The output as it leaves the boundary."""
        with torch.no_grad():
            output = self(tensors)
            return output.holding(crossing.leave(output.tensors))

    def record(self, tensors: Sequence[Tensor], needs: Sequence[bool], crossing: Crossing) -> Any:
        """The twin's, for gradients."""
        return self._twin.record(tensors, needs, crossing)

    def _look(self, tensors: Sequence[Tensor], samples: int) -> Packed:
        """The twin's output; and are the folded network's the same, and those of a sample by itself?"""
        device = self._networks.precision.device
        with watching_steadiness(self._networks.twin.engine.network, device) as seen:
            output = self._twin(tensors)
        if not seen.steady:
            self._trust.add(math.inf)
            return output
        exact = logits_of(output, samples)
        one = torch.zeros(1, dtype=torch.long, device=device)
        with random_state_kept(device):  # that of after the twin: a model that draws has other values now
            for rows in (None, one):
                found = self._try(tensors if rows is None else self._rows(tensors, rows)) if self._trust.good else None
                logits = None if found is None else logits_of(found, samples if rows is None else 1)
                if exact is None or logits is None:
                    self._trust.add(math.inf)
                else:
                    self._trust.add(most_off_by(logits, exact[: len(logits)]))
        return output

    def _try(self, tensors: Sequence[Tensor]) -> Packed | None:
        try:
            return self._folded(tensors)
        except UnbalancedFoldError:
            raise
        except Exception as error:  # perhaps the model's own, which the twin will raise
            if is_out_of_memory(error):
                raise
            return None

    def _distrust(self, tensors: Sequence[Tensor]) -> Packed:
        output = self._twin(tensors)
        self._trust.add(math.inf)  # last: what the model itself raises says nothing
        return output

    def _rows(self, tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
        own = batched(tensors, [t.is_floating_point() for t in tensors])
        return [t.index_select(0, index) if row else t for t, row in zip(tensors, own, strict=True)]


def logits_of(output: Packed, samples: int) -> Tensor | None:
    """The logits (N, C) in float32, if the output is that and nothing else."""
    if len(output.tensors) != 1 or output.hiding:
        return None
    (logits,) = output.tensors
    fits = logits.ndim == 2 and len(logits) == samples and logits.shape[1] > 1
    return logits if fits and logits.dtype == torch.float32 else None


def are_near(logits: Tensor, share: float) -> Tensor:
    """For which samples rounding might decide, bool (N,); NaN and inf are near everything."""
    top = logits.topk(2, dim=1).values
    return ~((top[:, 0] - top[:, 1] > share * largest_of(logits)) & (top[:, 0] < math.inf))


def largest_of(logits: Tensor) -> Tensor:
    """Each sample's largest absolute logit, of those that are finite: -inf says that a class is left out."""
    sizes = logits.abs()
    largest = sizes.amax(1)
    return largest if largest.amax() < math.inf else sizes.nan_to_num(0.0, posinf=0.0).amax(1)


def most_off_by(logits: Tensor, exact: Tensor) -> float:
    """How far logits are off at most, as a share of their sample's largest one; infinite if others are not finite."""
    if not torch.equal(logits.isfinite(), exact.isfinite()):
        return math.inf
    off = (logits - exact).nan_to_num(0.0, math.inf, math.inf).abs().amax(1)
    return float((off / largest_of(exact).clamp(min=torch.finfo(exact.dtype).tiny)).amax())
