"""``compare``: an attack on the plain model and on fast ones, measured in turn, and judged."""

import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attack import Norm
from ..model import FastAttackModel
from ..modules import (
    HALF,
    FastAttackWarning,
    accept_model,
    by_its_own_eval,
    device_of,
    is_in_hardware,
    past,
    random_state_kept,
    seed_generators,
)
from ..options import FastAttackOptions, check_options
from .attacking import Attacker, Run, attacker_for, refuse_class
from .budgets import Budget, budget_for, reach
from .data import accept_data, are_right, doubts
from .device import describe_device, versions
from .fidelity import Agreement, agreement, gradient_pass, reference_pass
from .leaving import lent_in_eval_mode, plain
from .memory import bytes_kept
from .result import Comparison
from .row import Effect, Row
from .showing import telling
from .timing import Way, measure_in_turn, quartiles, reason, seconds_of

LEAST_SECONDS = 0.05
"""An attack that is over sooner is run several times between two looks at the clock."""

MOST_ATTACKS = 100
"""It is run so many times at most."""

FASTER = 1.05
"""A way is recommended if it is so many times as fast as the plain model, in each of two measurements."""

CONFIRMING = 2
"""How many times as many rounds the second measurement has, which is of one way and the plain model alone."""

NEARLY = 0.95
"""The default options are recommended if they reach this share of the best speed: the simplest is best."""

ORDER: dict[Norm, float] = {"linf": math.inf, "l2": 2, "l1": 1}


def compare(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    attack: Any = None,
    eps: float | None = None,
    norm: Norm | None = None,
    bounds: tuple[float, float] = (0, 1),
    options: FastAttackOptions | None = None,
    repeats: int = 5,
    progress: bool = True,
) -> Comparison:
    """Measure on your model whether the fast one is faster, and whether it may be trusted.

    The attack runs on the plain model, on the fast one with default options, and on fast ones in each dtype that the
    device has in hardware; in turn, from the same random start, the first attack of each way untimed. What is to be
    recommended is measured once more. ::

        found = compare(model, images, labels, attack=torchattacks.PGD(model))
        found.print()
        fast = model if found.recommended is None else FastAttackModel(model, **found.recommended)

    The model is left as it was, gradients and buffers included; so are the global random generators.

    Args:
        model: a plain module that returns logits (N, C). It is attacked in eval mode.
        x: shape (N, ...), floating, within ``bounds``, on the model's device; one batch, attacked as a whole.
        y: labels, shape (N,), integers below C; None for the model's own predictions.
        attack: a torchattacks attack on ``model`` (a copy of the attack is run; yours stays as it is), a foolbox
            attack, a callable ``(model, x, y) -> adversarial``, or None for PGD (Madry et al. 2018, arXiv:1706.06083)
            in ``norm``: cross entropy, a random start, ten steps of ``eps / 4``.
        eps: budget in units of ``x``. None: the attack's own; 8/255 for PGD and foolbox attacks, which take any.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``: of the budget, and of distances. None: the attack's own, or ``"linf"``.
        bounds: the least and the largest value of ``x``; PGD and foolbox attacks are given them too.
        options: of ``FastAttackModel``, for all fast models here; what they say is not varied.
        repeats: timed rounds, at least 1.
        progress: show what is being done, on a terminal if rich is installed.

    Returns:
        A :class:`Comparison`.

    Raises:
        TypeError: ``model`` is no module; x or y is of another kind; an option does not exist; ``attack`` is a class,
            or a ``SafePGD``, which holds a model (pass ``lambda model, x, y: SafePGD(model, eps=...)(x, y)``).
        ValueError: values out of range, no logits, a model that cannot be wrapped, an attack on another model.
    """
    switched = by_its_own_eval(accept_model(model))  # before it is lent
    refuse_class(attack, "attack")
    budget, device = budget_for(attack, eps, norm, bounds), device_of(model)
    with torch.inference_mode(False), random_state_kept(device), lent_in_eval_mode(model), telling(progress) as say:
        _try_options(options or {}, device)
        y, logits = accept_data(model, x, y, budget, device)
        study = _Study(model, plain(x), y, attacker_for(attack, model, budget), options or {}, budget)
        notes = doubts(model, study.x, y, logits, budget, switched)
        recommended = study.run(repeats, say)
        notes += study.doubt_distance()
    setting = {**budget.record(), "repeats": repeats}
    name, reference, rows = study.attacker.name, _name(study.reference_dtype), list(study.rows.values())
    return Comparison(name, len(x), rows, recommended, reference, setting, describe_device(device), versions(), notes)


def _try_options(options: FastAttackOptions, device: torch.device) -> None:
    """Raise what is wrong with the options themselves; what a model makes of them is a finding, and no error."""
    check_options(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastAttackWarning)
        FastAttackModel(nn.Linear(1, 1, device=device), **options)


@dataclass
class _Study:
    """All ways on one batch: built, judged, timed, and one of them chosen."""

    model: nn.Module
    x: Tensor
    y: Tensor
    attacker: Attacker
    options: FastAttackOptions
    budget: Budget

    def __post_init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self._runs: dict[str, Run] = {}
        self._plain: tuple[Agreement, Effect]

    def run(self, repeats: int, say: Callable[[str], None]) -> str | None:
        """Everything; returns the name of the row that is recommended."""
        say("gradients in float64")
        self._reference, self.reference_dtype = reference_pass(self.model, self.x, self.y)
        say("the plain model")
        self.rows["plain"] = Row("plain", runs_in="as it is")
        self._begin(self.rows["plain"], lambda: self.attacker.on_plain(self.model), self.model)
        self._begin_fast("default", self.options, say)
        for name, options in self._others():
            self._begin_fast(name, options, say)
        names = [name for name, row in self.rows.items() if row.failure is None]
        say(f"timing {len(names)} ways in turn")
        self._time(names, repeats)
        for name in self._candidates():
            say(f"timing {name} once more")
            ratios = self._time(["plain", name], CONFIRMING * repeats)[name]
            if statistics.median(ratios) >= FASTER and quartiles(ratios)[0] >= 1:
                return name
        return None

    def doubt_distance(self) -> list[str]:
        """A note if the attack on the plain model goes farther than the budget that is reported."""
        budget, farthest = self.budget, self._plain[1].distance.nan_to_num(0, posinf=0).max().item()
        rounding = torch.finfo(self.x.dtype).eps * (float(self.x.abs().max()) + budget.eps)
        if not budget.stated or farthest <= reach(budget.eps, budget.bounds) + rounding:
            return []
        return [
            f"images of the attack are up to {past(farthest, budget.eps, '.4g')} away in {budget.norm}, which is "
            f"outside of eps: look which eps and norm the attack has"
        ]

    def _others(self) -> Iterator[tuple[str, FastAttackOptions]]:
        """Options that differ from the default ones in what they run in."""
        default = self.rows["default"].runs_in.split(", ")[0]
        if "dtype" in self.options or default == "float64" or self.x.dtype == torch.float64:
            return
        for dtype in (*(d for d in HALF if is_in_hardware(d, self.x.device)), torch.float32):
            name = _name(dtype)
            if name != default:
                yield name, {**self.options, "dtype": dtype}

    def _begin_fast(self, name: str, options: FastAttackOptions, say: Callable[[str], None]) -> None:
        say(f"the fast model: {name}")
        row = self.rows[name] = Row(name, options)
        try:
            fast = FastAttackModel(self.model, **options)
            self._begin(row, lambda: self.attacker.on_fast(self.model, options), fast)
        except Exception as error:
            row.failure = reason(error)
            self._runs.pop(name, None)

    def _begin(self, row: Row, make: Callable[[], Run], network: nn.Module) -> None:
        """Build one way, attack for the first time, and judge it."""
        found: Any = None

        def first() -> None:
            nonlocal found
            self._runs[row.name] = make()
            seed_generators(0, self.x.device)
            found = self._attack(self._runs[row.name])

        row.first_seconds = seconds_of(first, self.x.device)
        gradients = gradient_pass(network, self.x, self.y)
        if isinstance(network, FastAttackModel):  # known after a gradient pass only
            row.runs_in = f"{_name(network.dtype)}, {network.engine}"
        agreed, effect = agreement(gradients, self._reference), self._effect(found)
        if network is self.model:
            self._plain = agreed, effect
        row.put(agreed, self._plain[0])
        row.judge(effect, self._plain[1], self.rows["plain"])
        with suppress(Exception):  # a model that cannot be copied, say
            row.kept_bytes = bytes_kept(network, self.x).total

    def _attack(self, run: Run) -> Tensor:
        """Run it once, on tensors that it may write into."""
        return run(self.x.clone(), self.y.clone())

    def _effect(self, adversarial: Any) -> Effect:
        """What the attack did, as the plain model sees it."""
        x = self.x
        if not isinstance(adversarial, Tensor) or adversarial.shape != x.shape:
            got = tuple(adversarial.shape) if isinstance(adversarial, Tensor) else type(adversarial).__name__
            raise ValueError(f"expected the attack to return a tensor of shape {tuple(x.shape)}, got {got}: return x'")
        adversarial = adversarial.detach().to(x)
        with torch.no_grad():
            robust = are_right(self.model(adversarial), self.y)
        robust |= ~adversarial.flatten(1).isfinite().all(1)  # no image
        apart = (adversarial.cpu().double() - x.cpu().double()).flatten(1)  # not every device has float64
        return Effect(robust.cpu(), torch.linalg.vector_norm(apart, ORDER[self.budget.norm], 1))

    def _time(self, names: list[str], repeats: int) -> dict[str, list[float]]:
        """Time these ways in turn, add what was found to their rows, and return each one's ratios."""
        counts = {name: self._attacks_between_looks(name) for name in names}
        ways = {
            name: Way(self._several(name, counts[name]), lambda: seed_generators(0, self.x.device)) for name in names
        }
        timings = measure_in_turn(ways, device=self.x.device, repeats=repeats)
        seconds = {name: [s / counts[name] for s in timing.seconds] for name, timing in timings.items()}
        found = {}
        for name, own in seconds.items():
            found[name] = [p / o for p, o in zip(seconds["plain"], own, strict=True)]
            self.rows[name].seconds += own
            self.rows[name].ratios += found[name]
        return found

    def _several(self, name: str, count: int) -> Callable[[], object]:
        def run() -> None:
            for _ in range(count):
                self._attack(self._runs[name])

        return run

    def _attacks_between_looks(self, name: str) -> int:
        """How many attacks make a time that can be measured."""
        once = seconds_of(self._several(name, 1), self.x.device)
        return max(1, min(MOST_ATTACKS, math.ceil(LEAST_SECONDS / once)))

    def _candidates(self) -> list[str]:
        """Ways that are faithful and faster, the best first."""
        good = [row for name, row in self.rows.items() if name != "plain" and row.faithful and row.ratio >= FASTER]
        best = max((row.ratio for row in good), default=0.0)
        good.sort(key=lambda row: (row.name != "default" or row.ratio < NEARLY * best, -row.ratio))
        return [row.name for row in good]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
