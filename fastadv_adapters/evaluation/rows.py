"""What is known of a sample: while it is under attack, and once it is finished."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

CLEAN = "clean"
"""Stands for an attack in a row whose sample is misclassified as it is."""


@dataclass(frozen=True)
class Row:
    """A finished sample.

    Attributes:
        index: its place in the data.
        hash: of the image, its dtype and shape.
        label: the class that it should have.
        clean: the class that the plain model gives the image itself; -1 if it has none, for a logit is NaN or the
            largest is infinite.
        broken_by: the attack that broke it, ``"clean"`` if it is misclassified as it is, None if it stands.
        eps: the smallest of the budgets at which it broke, 0 if it is misclassified as it is, None if it stands.
        prediction: the class that the plain model gives the adversarial, or the image itself if it stands; -1 as above.
        linf: the largest change of a coordinate in the adversarial, None if there is none.
        l2: the Euclidean length of the change, or None.
        l1: the sum of absolute changes, or None.
        forward: forward passes that attacks took, a mean over its batch for attacks of other libraries; None if one of
            them runs on a model of its own.
        backward: backward passes, counted in the same way.
        seconds: its share of the time that attacks took.
        denied: how many attacks claimed an adversarial within the budget that the plain model denies.
        borderline: whether the verdict is within rounding: the two largest logits of the deciding candidate agree to
            about five digits (a model in float16 to about two and a half, one in bfloat16 to one and a half).
        outside: the attacks whose image was not within eps and bounds, so that it does not count, each once per budget.
    """

    index: int
    hash: str
    label: int
    clean: int
    broken_by: str | None
    eps: float | None
    prediction: int
    linf: float | None
    l2: float | None
    l1: float | None
    forward: float | None
    backward: float | None
    seconds: float
    denied: int
    borderline: bool
    outside: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The attributes, ready for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Row":
        """The row with these attributes; files of before lack ``outside``."""
        found = {f.name: values[f.name] for f in fields(cls) if f.name != "outside"}
        return cls(**found, outside=tuple(values.get("outside", ())))


@dataclass
class Case:
    """A sample on its way through the attacks.

    Attributes that are not named here are those of its row, as far as they are known.

    Attributes:
        x: the image, on the model's device.
        rivals: the likeliest other classes, the likeliest first.
    """

    index: int
    hash: str
    x: Tensor
    label: int
    clean: int
    rivals: list[int] = field(default_factory=list)
    forward: float | None = 0
    backward: float | None = 0
    seconds: float = 0.0
    denied: int = 0
    borderline: bool = False
    outside: list[str] = field(default_factory=list)

    def add(self, forward: float | None, backward: float | None, seconds: float) -> None:
        """Count passes and time; None for passes that nobody counts."""
        self.forward = None if forward is None or self.forward is None else self.forward + forward
        self.backward = None if backward is None or self.backward is None else self.backward + backward
        self.seconds += seconds

    def finished(
        self,
        broken_by: str | None = None,
        eps: float | None = None,
        prediction: int | None = None,
        distances: Sequence[float | None] = (None, None, None),
    ) -> Row:
        """Its row; without arguments that of a sample that stands."""
        linf, l2, l1 = distances
        return Row(
            index=self.index,
            hash=self.hash,
            label=self.label,
            clean=self.clean,
            broken_by=broken_by,
            eps=eps,
            prediction=self.clean if prediction is None else prediction,
            linf=linf,
            l2=l2,
            l1=l1,
            forward=self.forward,
            backward=self.backward,
            seconds=self.seconds,
            denied=self.denied,
            borderline=self.borderline,
            outside=tuple(self.outside),
        )
