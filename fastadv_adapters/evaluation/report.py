"""What an evaluation found, with the numbers that can be quoted."""

import os
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..attack import NONE_RIGHT, doubt_accuracy, doubt_classes, wilson
from ..comparison import write_json
from .pictures import draw_report, draw_triples
from .rows import CLEAN, Row
from .store import SHOWN, Folder

_VAIN = (
    "not within eps and bounds of the evaluation, which does not count as broken: make the attack with the same eps, "
    "norm and bounds, if it takes them"
)
_COARSE = (
    "samples that were finished before it may stand since gradients were too coarse. Evaluate again in the dtype that "
    "it names"
)
_COPIES = "counts, and the interval takes it for a new one"
_CALLED, _DENIED = "that an attack called adversarial", "right by the plain model, which does not count as broken"

Images = Callable[..., dict[int, tuple[Tensor, Tensor | None]]]


@dataclass(frozen=True, repr=False)
class Report:
    """What an evaluation found.

    Broken samples are finished first. So shares of an evaluation that is not ``complete`` look worse than they are.

    Attributes:
        header: settings, versions, attacks, and who model and data are.
        samples: a row per sample, in order of the index.
        images: a function that returns index -> (adversarial, clean image or None), of all or of the
            indices that it is given; see :meth:`adversarials`.
        findings: of audits that failed on the way.
    """

    header: dict[str, Any]
    samples: tuple[Row, ...]
    images: Images = field(default=lambda among=None: {}, compare=False)
    findings: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Report":
        """The report of the evaluation in a folder, whose samples are those that are finished.

        Raises:
            ValueError: it holds no evaluation, or no sample is finished.
        """
        place = Folder(folder)
        header = place.header()
        if header is None:
            raise ValueError(f"expected the folder of an evaluation, got {folder}: pass what was given as output")
        rows = place.rows()

        def images(among: Container[int] | None = None) -> dict[int, tuple[Tensor, Tensor | None]]:
            return {index: (image, clean) for index, image, clean in place.images(among)}

        return cls.of(header, rows, images, place.findings())

    @classmethod
    def of(cls, header: dict[str, Any], rows: dict[int, Row], images: Images, findings: Sequence[str] = ()) -> "Report":
        """A report of these rows; ``images`` gives adversarials and clean images by index.

        Raises:
            ValueError: there is no row.
        """
        if not rows:
            raise ValueError("expected an evaluation with finished samples, got none: run it again, and it goes on")

        def of_broken(among: Container[int] | None = None) -> dict[int, tuple[Tensor, Tensor | None]]:
            """A process that was killed may have left others, whose rows it did not write any more."""
            broken = {i for i, row in rows.items() if row.broken_by not in (None, CLEAN)}
            wanted = broken if among is None else {i for i in broken if i in among}
            found = images(wanted)
            return {i: found[i] for i in found if i in wanted}

        return cls(header, tuple(rows[index] for index in sorted(rows)), of_broken, tuple(dict.fromkeys(findings)))

    @property
    def clean_accuracy(self) -> float:
        """The share of samples that the plain model classifies as labelled, 0 to 1."""
        return sum(row.broken_by != CLEAN for row in self.samples) / len(self.samples)

    @property
    def robust_accuracy(self) -> float:
        """The share of finished samples that stand up to all attacks, 0 to 1; of several budgets at the largest."""
        return self._standing / len(self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the robust accuracy for other samples of the same kind (Wilson)."""
        return wilson(self._standing, len(self.samples))

    @property
    def curve(self) -> dict[float, float]:
        """Robust accuracy by budget; what broke within a smaller budget is broken within a larger one."""
        budgets = self.header["settings"]["eps"]
        return {
            eps: sum(row.eps is None or row.eps > eps for row in self.samples) / len(self.samples) for eps in budgets
        }

    @property
    def by_attack(self) -> dict[str, float]:
        """Accuracy before any attack and after each of them, in their order, with whichever of several budgets."""
        broken = Counter(row.broken_by for row in self.samples)
        left, found = len(self.samples), {}
        for name in (CLEAN, *self.header["settings"]["attacks"]):
            left -= broken[name]
            found[name] = left / len(self.samples)
        return found

    @property
    def borderline(self) -> int:
        """How many verdicts are within rounding, so that other batches or devices may see them otherwise."""
        return sum(row.borderline for row in self.samples)

    @property
    def denied(self) -> int:
        """How many images within the budget an attack held to be adversarial, and the plain model does not."""
        return sum(row.denied for row in self.samples)

    @property
    def outside(self) -> dict[str, int]:
        """How many images of an attack are not within eps and bounds, and so do not count; of all budgets together."""
        counts = Counter(name for row in self.samples for name in row.outside)
        return {name: counts[name] for name in self.header["settings"]["attacks"] if counts[name]}

    @property
    def random(self) -> bool:
        """Whether the model draws random numbers, so that its verdicts are majorities of several passes."""
        return bool(self.header["model"]["random"])

    @property
    def complete(self) -> bool:
        """Whether all samples are finished."""
        return len(self.samples) == int(self.header["data"]["samples"])

    @property
    def notes(self) -> list[str]:
        """What to know beside the numbers, such as settings that are seldom meant, and what was found on the way."""
        left = int(self.header["data"]["samples"]) - len(self.samples)
        twice = len(self.samples) - len({row.hash for row in self.samples})
        lost = sum(-1 in (row.clean, row.prediction) for row in self.samples)
        said = [
            NONE_RIGHT if self.clean_accuracy == 0 else None,
            _told(twice, "sample has the image of another: it", "samples have the image of another: each", _COPIES),
            _told(self.borderline, "verdict is", "verdicts are", "within rounding"),
            _told(self.denied, f"image {_CALLED} is", f"images {_CALLED} are", _DENIED),
            "the model draws random numbers: verdicts are majorities of several passes" if self.random else None,
            _told(left, "sample is", "samples are", "not finished"),
            self._by_chance(),
            doubt_classes(lost),
        ]
        vain = [
            _told(n, f"image of the attack {name} is", f"images of the attack {name} are", _VAIN)
            for name, n in self.outside.items()
        ]
        said += [f"an audit failed on the way: {text}; {_COARSE}" for text in self.findings]
        return [*self.header.get("notes", []), *(text for text in (*vain, *said) if text is not None)]

    @property
    def quote(self) -> str:
        """One sentence to be quoted, with attacks and versions; it says so if not all samples are finished."""
        settings, versions = self.header["settings"], self.header["versions"]
        attacks = ", ".join(settings["attacks"].values())
        told = f"{settings['norm']}, eps = {settings['eps'][-1]:.6g}; {attacks}; "
        return f"{self._accuracies()}, {told}{', '.join(f'{k} {v}' for k, v in versions.items())}"

    def as_dict(self) -> dict[str, Any]:
        """All that is known but the images, ready for JSON; keys are the names of the attributes."""
        names = ("clean_accuracy", "robust_accuracy", "interval", "by_attack", "borderline", "denied", "outside")
        found = {name: getattr(self, name) for name in (*names, "random", "complete", "quote", "notes")}
        found["curve"] = [[eps, accuracy] for eps, accuracy in self.curve.items()]
        return {**found, "header": self.header, "samples": [row.as_dict() for row in self.samples]}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write all that is known but the images; the file is replaced as a whole.

        Raises:
            OSError: it cannot be written to.
        """
        write_json(path, self.as_dict(), indent=1)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw accuracy attack by attack, passes per sample, and robust accuracy against eps if there are several.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the ending of ``path`` names no format.
            OSError: it cannot be written to.
        """
        draw_report(self.by_attack, self.curve, self.samples, path)

    def triples(self, path: str | os.PathLike[str], n: int = 8) -> None:
        """Draw clean image, perturbation and adversarial of the first ``n`` broken samples.

        They are taken from the first 64 samples of the data, whose clean images are kept. Each has a row, which tells
        its class, the class after the attack, and what broke it.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there is none, images are no images, or the ending of ``path`` names no format.
            OSError: it cannot be written to.
        """
        rows = [row for row in self.samples if row.broken_by not in (None, CLEAN) and row.index < SHOWN][:n]
        images = self.images({row.index for row in rows})
        shown = [
            (row, clean, images[row.index][0])
            for row in rows
            if row.index in images and (clean := images[row.index][1]) is not None
        ]
        if not shown:
            raise ValueError(
                "expected a broken sample whose images are kept, got none: only the first samples of the data are kept "
                "for pictures, and only by the process that attacked them, or in the output folder"
            )
        draw_triples(shown, tuple(self.header["settings"]["bounds"]), path)

    def adversarials(self) -> dict[int, Tensor]:
        """The adversarial, shape (...), of every broken sample that an attack has changed, by index in the data."""
        return {index: adversarial for index, (adversarial, _) in self.images().items()}

    def __str__(self) -> str:
        lines, curve = [self.quote], self.curve
        if self.complete:
            lines += [f"  {name}: {100 * accuracy:.2f} %" for name, accuracy in self.by_attack.items()]
            lines += [f"  eps = {eps:.6g}: {100 * share:.2f} %" for eps, share in curve.items() if len(curve) > 1]
        lines += [f"  note: {text}" for text in self.notes]
        return "\n".join(lines)

    def __repr__(self) -> str:
        accuracies = f"robust_accuracy={self.robust_accuracy:.4f}, clean_accuracy={self.clean_accuracy:.4f}"
        return f"Report({accuracies}, samples={len(self.samples)})"

    def _accuracies(self) -> str:
        done, total = len(self.samples), int(self.header["data"]["samples"])
        if not self.complete:
            most = self._standing + total - done
            between = f"between {100 * self._standing / total:.2f} and {100 * most / total:.2f} %"
            return f"not finished, {done} of {total} samples: {between} robust accuracy"
        low, high = self.interval
        return (
            f"{100 * self.robust_accuracy:.2f} % robust accuracy (95 % interval {100 * low:.2f} to {100 * high:.2f} %) "
            f"and {100 * self.clean_accuracy:.2f} % clean accuracy on {done} samples"
        )

    def _by_chance(self) -> str | None:
        """A note if nothing shows that the model knows the classes; of finished samples alone most may be wrong."""
        classes = self.header["model"].get("classes")  # unknown in folders of earlier versions
        right = sum(row.broken_by != CLEAN for row in self.samples)
        return doubt_accuracy(right, len(self.samples), classes) if classes and self.complete else None

    @property
    def _standing(self) -> int:
        return sum(row.broken_by is None for row in self.samples)


def _told(count: int, one: str, many: str, rest: str) -> str | None:
    """How many there are, in words; None if there is none."""
    return f"{count} {one if count == 1 else many} {rest}" if count else None
