"""Is a way of attacking right? Gradients that vanish, their direction, and the robust accuracy that comes of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shared.budget import NO_TIME, Budget
from benchmarks.shared.deadline import STOPPED, OutOfTimeError
from benchmarks.shared.report import Table
from benchmarks.shared.rows import Prepared, Row, Setup, mean_loss
from digits import Digits, DigitsNet, accuracy, grey_digits, train
from fastadv_adapters.comparison import reason, row_cosines

RIGHT, STRONGER, WRONG, FAILED, UNJUDGED = "right", "stronger", "WRONG", "failed", "not judged"

JUDGEMENT = (
    "Robust accuracy is judged by the plain network. WRONG: a gradient is zero that is not in plain float32, or "
    "robust accuracy is overestimated by more than one image in a hundred. Stronger: not wrong, and robust accuracy is "
    "lower than after the plain attack by more than one image in a hundred. Right: neither."
)


@dataclass(frozen=True)
class Outcome:
    """What one way of attacking does on one network.

    Attributes:
        zero: share of the samples whose gradient is zero in every entry, 0 to 1.
        newly_zero: the same, of samples whose plain float32 gradient is not.
        cosine: mean over the samples of the cosine with the float64 gradient; a zero gradient has 0.
        robust: robust accuracy under the attack, 0 to 1.
        verdict: whether the attack can be trusted as far as the plain one.
        failure: why nothing was found; None otherwise.
    """

    zero: float = float("nan")
    newly_zero: float = float("nan")
    cosine: float = float("nan")
    robust: float = float("nan")
    verdict: str = FAILED
    failure: str | None = None


@dataclass(frozen=True)
class Subject:
    """A trained network, the data it was trained on, and how it is attacked: budget and number of images."""

    name: str
    model: nn.Module
    data: Digits
    eps: float
    images: int


def confident_digits(device: torch.device, *, images: int, epochs: int, seed: int, width: int = 32) -> Subject:
    """The digits network, trained without attacks until it is confident, which is what makes gradients vanish."""
    torch.manual_seed(seed)
    data = Digits(*(part.to(device) for part in grey_digits()))
    model = DigitsNet(width=width).to(device)
    train(model, data.train_images, data.train_labels, epochs=epochs, seed=seed, show_progress=False)
    return Subject("digits network", model.eval(), data, 0.2, images)


def judge(
    rows: Sequence[Row],
    subject: Subject,
    *,
    steps: int,
    seed: int,
    model: nn.Module | None = None,
    budget: Budget | None = None,
) -> Judgement:
    """Attack the subject in every way, from the same random start.

    Args:
        rows: the ways; first the plain one, with which the others are compared.
        subject: whom to attack.
        steps: of projected gradient descent.
        seed: of the random starts.
        model: what to attack in the place of the subject's own model, its logits multiplied, say.
        budget: once it is used up, ways that compile are left out, and a hard one stops one that is at it.
    """
    model = subject.model if model is None else model
    x, y = (part[: subject.images] for part in (subject.data.test_images, subject.data.test_labels))
    setup = Setup(subject.eps, steps, x.device)
    exact = Prepared(lambda x, y: x, copy.deepcopy(model).double(), mean_loss).gradient(x.double(), y).flatten(1)
    plain_zero = ~Prepared(lambda x, y: x, model, mean_loss).gradient(x, y).flatten(1).any(1)
    outcomes: dict[str, Outcome] = {}
    for row in sorted(rows, key=lambda row: row.compiles):  # what takes a compiler's time comes last
        if row.compiles and budget is not None and budget.left < 0:
            outcomes[row.key] = Outcome(verdict=UNJUDGED, failure=NO_TIME)
            continue
        try:
            with budget.held() if row.compiles and budget is not None else nullcontext():
                found = _outcome(row, model, setup, (x, y), (exact, plain_zero), seed)
            outcomes[row.key] = _with_verdict(found, next(iter(outcomes.values()), found))
        except Exception as error:
            outcomes[row.key] = Outcome(failure=reason(error))
        except OutOfTimeError:
            outcomes[row.key] = Outcome(verdict=UNJUDGED, failure=STOPPED)
    outcomes = {row.key: outcomes[row.key] for row in rows}
    labels = {row.key: row.label for row in rows}
    return Judgement(subject, labels, outcomes, steps, accuracy(model, x, y))


def _outcome(
    row: Row, model: nn.Module, setup: Setup, batch: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], seed: int
) -> Outcome:
    x, y = batch
    exact, plain_zero = truth
    prepared = row.build(model, setup)
    gradient = prepared.gradient(x, y).double().flatten(1)
    zero = ~gradient.any(1)
    torch.manual_seed(seed)
    return Outcome(
        zero=zero.double().mean().item(),
        newly_zero=(zero & ~plain_zero).double().mean().item(),
        cosine=row_cosines(gradient, exact).mean().item(),
        robust=accuracy(model, prepared.attack(x, y), y),
    )


def _with_verdict(found: Outcome, plain: Outcome) -> Outcome:
    wrong = found.newly_zero > 0 or found.robust > plain.robust + 0.01
    verdict = WRONG if wrong else STRONGER if found.robust < plain.robust - 0.01 else RIGHT
    return Outcome(found.zero, found.newly_zero, found.cosine, found.robust, verdict)


@dataclass(frozen=True)
class Judgement:
    """What all ways do on one network; `clean` is its accuracy without attack."""

    subject: Subject
    labels: dict[str, str]
    outcomes: dict[str, Outcome]
    steps: int
    clean: float

    def table(self, title: str) -> Table:
        """One line per way."""
        columns = (
            "way",
            "zero gradients",
            "zero here alone",
            "cosine with float64",
            "robust accuracy",
            "verdict",
        )
        note = (
            f"{self.subject.images} test images, PGD-{self.steps} with eps {self.subject.eps:g}, clean accuracy "
            f"{self.clean:.1%}."
        )
        return Table(title, columns, [self._line(key) for key in self.outcomes], note, JUDGEMENT)

    def _line(self, key: str) -> tuple[str, ...]:
        found = self.outcomes[key]
        if found.failure is not None:
            return self.labels[key], "", "", "", "", found.failure
        shares = (f"{found.zero:.1%}", f"{found.newly_zero:.1%}", f"{found.cosine:.4f}", f"{found.robust:.1%}")
        return self.labels[key], *shares, found.verdict

    def record(self) -> dict[str, Any]:
        """All numbers, by way."""
        return {key: {"label": self.labels[key], **_known(found)} for key, found in self.outcomes.items()}


def _known(found: Outcome) -> dict[str, Any]:
    """What was found, without the numbers that a failure has left open."""
    return asdict(found) if found.failure is None else {"verdict": found.verdict, "failure": found.failure}
