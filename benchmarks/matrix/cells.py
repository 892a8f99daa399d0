"""One cell of the matrix: one case on one network in one way, run, judged by the plain model, and kept in a file."""

import functools
import hashlib
import json
import math
import random
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastadv_adapters
from benchmarks.matrix import attacking
from benchmarks.matrix.attacking import Attacked, attack, compile_solver, targets_of
from benchmarks.matrix.cases import Case, Norm, Row
from benchmarks.matrix.subjects import Binarised, Subject, recipe_of
from fastadv_adapters.comparison import versions
from fastadv_adapters.modules.notices import FastAttackWarning

PLAIN = "plain"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The ways of attacking but the plain one: what the fast network computes in."""
_ROUNDING = 1e-3  # a perturbation may pass its budget by this share, and an image its bounds by this much
MOVE = 1e-4
"""How far a second look moves each pixel at most."""
_TIE = 1e-4  # logits this near to each other are equal: some attacks end on the border itself, give or take rounding


@dataclass(frozen=True)
class Cell:
    """Where a result belongs.

    Attributes:
        subject: name of the network.
        library: of the attack.
        attack: its name.
        label: of the case.
        way: `"plain"`, or the dtype of the fast model.
        images: how many.
        seed: of all random generators.
    """

    subject: str
    library: str
    attack: str
    label: str
    way: str
    images: int
    seed: int

    def path(self, cache: Path) -> Path:
        """The file for its outcome."""
        label = re.sub(r"\W+", "-", self.label) or "default"
        return cache / self.subject / f"{self.library}-{self.attack}-{label}-{self.way}-{self.images}-{self.seed}.json"


@dataclass(frozen=True)
class Outcome:
    """What happened in a cell.

    Attributes:
        robust: images that the plain model still gets right; in targeted cases those that miss the target.
        distance: median over all images, infinite for those that were not broken.
        seconds: of the attack alone.
        samples: in backward passes.
        zero: samples among them with a zero gradient.
        nonfinite: samples among them with infinite or NaN entries.
        digest: of the adversarial images, bit by bit.
        broken: which images were broken, as a line of 0 and 1.
        chosen: the options that the attack's models had.
        warned: the warnings of the fast model.
        error: what the attack raised; empty if it ran through.
        signature: of the case, the network and the code as they were; a change of any makes the outcome void.
    """

    robust: int = 0
    distance: float = math.inf
    seconds: float = 0.0
    samples: int = 0
    zero: int = 0
    nonfinite: int = 0
    digest: str = ""
    broken: str = ""
    chosen: str = ""
    warned: str = ""
    error: str = ""
    signature: str = ""


def signature(cell: Cell, case: Case) -> str:
    """A text that changes with the case, with the network and its budgets, and with all code that takes part."""
    return hashlib.sha256(repr((case, recipe_of(cell.subject), _code())).encode()).hexdigest()[:12]


@functools.cache
def _code() -> str:
    """The package, what judges it here, and the versions of the libraries, as one text."""
    files = [*Path(fastadv_adapters.__file__).parent.rglob("*.py"), Path(__file__), Path(attacking.__file__)]
    return repr([versions(), *(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files))])


def read(cell: Cell, case: Case, cache: Path) -> Outcome | None:
    """The outcome that was kept, or None if there is none for the case as it is now."""
    path = cell.path(cache)
    if not path.exists():
        return None
    outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
    return outcome if outcome.signature == signature(cell, case) else None


def write(cell: Cell, outcome: Outcome, cache: Path) -> None:
    """Keep an outcome; a reader sees all of it or nothing."""
    path = cell.path(cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(asdict(outcome)) + "\n", encoding="utf-8")
    unfinished.replace(path)


def run(cell: Cell, row: Row, case: Case, subject: Subject, *, limit: int) -> Outcome:
    """Attack and judge; whatever the attack raises becomes part of the outcome.

    Args:
        cell: what to run.
        row: its attack.
        case: its case.
        subject: its network.
        limit: seconds after which the attack is given up.
    """
    model = Binarised(subject.net).eval() if case.model == "binarised" else subject.net
    x, y = subject.images[: cell.images], subject.labels[: cell.images]
    x = _moved(x, cell.seed)
    _seed(cell.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            compile_solver(row.attack)
            with _given_up_after(limit):
                found = attack(row, case, model, subject, x.clone(), y.clone(), DTYPES.get(cell.way))
        except Exception as error:  # any error at all is a result here
            return Outcome(error=_in_short(error), warned=_warned(caught), signature=signature(cell, case))
    judged = _judged(found, case, model, subject, x, y)
    return replace(judged, warned=_warned(caught), signature=signature(cell, case))


def _judged(found: Attacked, case: Case, model: nn.Module, subject: Subject, x: Tensor, y: Tensor) -> Outcome:
    distances = distance(found.images - x, case.norm)
    broken = _broken(found.images, case, model, y)
    if case.budget is not None:
        broken &= distances <= case.budget * subject.budgets[case.norm] * (1 + _ROUNDING)
    samples, zero, nonfinite = found.gradients
    return Outcome(
        robust=int((~broken).sum()),
        distance=float(distances.where(broken, torch.inf).quantile(0.5, interpolation="higher")),
        seconds=found.seconds,
        samples=samples,
        zero=zero,
        nonfinite=nonfinite,
        broken="".join(map(str, broken.int().tolist())),
        digest=hashlib.sha256(found.images.contiguous().numpy().tobytes()).hexdigest()[:16],
        chosen=found.chosen,
    )


@torch.no_grad()
def _broken(images: Tensor, case: Case, model: nn.Module, y: Tensor) -> Tensor:
    """Which images are valid and fool the model, bool (N,)."""
    valid = (images.isfinite() & (images >= -_ROUNDING) & (images <= 1 + _ROUNDING)).flatten(1).all(dim=1)
    logits = model(images.nan_to_num())
    own = functional.one_hot(y, logits.shape[1]).bool()
    if case.targeted in ("label", "criterion"):  # the others head for a target, and take any other class
        own = ~functional.one_hot(targets_of(y), logits.shape[1]).bool()
    lost = logits.where(own, -torch.inf).amax(dim=1) - logits.where(~own, -torch.inf).amax(dim=1)
    broken: Tensor = valid & (lost <= _TIE)
    return broken


def distance(perturbation: Tensor, norm: Norm) -> Tensor:
    """The size (N,) of each perturbation (N, ...)."""
    flat = perturbation.flatten(1)
    if norm == "l0":
        return (flat != 0).sum(dim=1).to(flat.dtype)
    order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}[norm]
    size: Tensor = torch.linalg.vector_norm(flat, order, dim=1)
    return size


def _moved(x: Tensor, seed: int) -> Tensor:
    """Images a little aside, for a second look: by how much does the attack amplify what is next to nothing?"""
    if not seed:
        return x
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    return (x + MOVE * (2 * noise - 1)).clamp(0, 1)


def _seed(seed: int) -> None:
    """Seed all generators that the libraries draw from: foolbox draws from numpy's global one too."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _warned(caught: list[warnings.WarningMessage]) -> str:
    return "; ".join(sorted({str(w.message)[:200] for w in caught if issubclass(w.category, FastAttackWarning)}))


@contextmanager
def _given_up_after(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds; main threads of Unix processes only."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
