"""What is found of one way to run the attack: the plain model, or a fast one with some options."""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..modules import past
from ..options import FastAttackOptions
from .fidelity import Agreement
from .timing import quartiles
from .writing import finite

COSINE = 0.9
"""The least median of the gradients' cosine with float64 that is called faithful, if the plain model reaches it."""

SHARE = 0.01
"""The share of the images by which a faithful attack may leave more standing than the plain one."""

LONGER = 1.05
"""The most by which a faithful attack's median distance may exceed the plain one's: matters if it is minimised."""


@dataclass(frozen=True)
class Effect:
    """What the attack does, as the plain model judges it; tensors of shape (N,).

    Attributes:
        robust: whether the sample is still classified as labelled.
        distance: of the adversarial from the sample, in the norm of the comparison.
    """

    robust: Tensor
    distance: Tensor


@dataclass
class Row:
    """One way to run the attack. Times are those of one attack on the whole batch.

    Gradients are those of the cross entropy at the images, before any attack.

    Attributes:
        name: ``"plain"``, ``"default"``, or what the options change.
        options: of ``FastAttackModel``; None for the plain model.
        runs_in: dtype and engine.
        seconds: every measured time, warm-up left out.
        ratios: by how many times it was faster than the plain model, pair by pair.
        first_seconds: making the fast model, and the first attack.
        kept_bytes: kept for the backward pass, per sample; None if it cannot be told.
        logits_error: median over the samples of the largest error of a logit, relative to the largest logit.
        classes_differ: samples with another class than in the reference, in a pass with gradient.
        cosines: of each gradient with the reference's, -1 to 1; 0 for a gradient of zeros, NaN for one not finite.
        signs: mean share of the entries with the reference's sign, 0 to 1.
        zero: samples whose gradient is all 0.
        spoilt: samples whose gradient or logits have infinite or NaN entries. (Elsewhere *spoilt* is about gradients
            alone.)
        lost: samples whose gradient is all 0 or not finite, though the plain model's is neither. (More than what is
            called lost elsewhere, which is about infinite and NaN entries alone.)
        robust_accuracy: after this attack, judged by the plain model, 0 to 1.
        differ: images that stand here and are broken by the plain attack, or the other way round.
        distance: median distance of the adversarials of images that were broken; None if none was.
        faults: why it is not faithful; empty if it is.
        failure: why it could not be run; None if it could.
    """

    name: str
    options: FastAttackOptions | None = None
    runs_in: str = ""
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    kept_bytes: float | None = None
    logits_error: float | None = None
    classes_differ: int = 0
    cosines: list[float] = field(default_factory=list)
    signs: float | None = None
    zero: int = 0
    spoilt: int = 0
    lost: int = 0
    robust_accuracy: float | None = None
    differ: int = 0
    distance: float | None = None
    faults: list[str] = field(default_factory=list)
    failure: str | None = None

    @property
    def faithful(self) -> bool:
        """Whether the attack may be trusted as far as the plain one, without ``faults`` and without a ``failure``."""
        return self.failure is None and not self.faults

    @property
    def median_seconds(self) -> float:
        """Median of ``seconds``."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def ratio(self) -> float:
        """Median of ``ratios``: above 1 is faster than the plain model."""
        return statistics.median(self.ratios) if self.ratios else float("nan")

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile of ``ratios``."""
        return quartiles(self.ratios or [self.ratio])

    @property
    def cosine(self) -> float:
        """Median of ``cosines``, those that are not numbers taken as 0."""
        return statistics.median(c if c == c else 0.0 for c in self.cosines) if self.cosines else float("nan")

    def record(self) -> dict[str, Any]:
        """Everything as JSON has it; numbers that are not finite become None."""
        given = (self.options or {}).items()
        texts = {name: str(value) if isinstance(value, torch.dtype) else value for name, value in given}
        whole = {
            **asdict(self),
            "options": None if self.options is None else texts,
            "median_seconds": self.median_seconds,
            "ratio": self.ratio,
            "spread": self.spread,
            "cosine": self.cosine,
            "faithful": self.faithful,
        }
        return dict(finite(whole))

    def put(self, agreement: Agreement, plain: Agreement) -> None:
        """Take in how logits and gradients agree with the reference, beside those of the plain model."""
        useless = agreement.zero | agreement.spoilt
        self.logits_error = agreement.logits_error.nanmedian().item()
        self.classes_differ = int((~agreement.same_class).sum())
        self.cosines = agreement.cosine.tolist()
        self.signs = agreement.signs.mean().item()
        self.zero, self.spoilt = int(agreement.zero.sum()), int(agreement.spoilt.sum())
        self.lost = int((useless & ~(plain.zero | plain.spoilt)).sum())

    def judge(self, effect: Effect, plain: Effect, plain_row: "Row") -> None:
        """Take in what the attack does, and say whether it is as strong as the plain one."""
        samples = len(effect.robust)
        self.robust_accuracy = effect.robust.double().mean().item()
        self.differ = int((effect.robust != plain.robust).sum())
        self.distance = _median(effect.distance[~effect.robust])
        more = int(effect.robust.sum()) - int(plain.robust.sum())
        fell = ~effect.robust & ~plain.robust
        longer = _median(effect.distance[fell]) or 0.0
        if self.lost:
            self.faults.append(
                f"{self.lost} of {samples} gradients are zero or not finite that are not in the plain one"
            )
        if not self.cosine >= (limit := min(COSINE, plain_row.cosine - 0.01)):
            told = past(self.cosine, limit, ".3f")
            self.faults.append(f"the median cosine of its gradients with float64 is {told}")
        if more > max(1, SHARE * samples):
            self.faults.append(f"{more} of {samples} images more stand than after the attack on the plain model")
        if longer > LONGER * (_median(plain.distance[fell]) or 0.0):
            self.faults.append(f"its adversarials are farther away: {longer:.4g} in the median")


def _median(values: Tensor) -> float | None:
    return values.median().item() if len(values) else None
