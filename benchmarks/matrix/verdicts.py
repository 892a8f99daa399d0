"""Is an attack as strong on the fast model as on the plain one? The limits, and one word per case."""

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

from benchmarks.matrix.cases import Rule
from benchmarks.matrix.cells import Outcome

Verdict = Literal[
    "bit-equal",
    "as strong",
    "within spread",
    "stronger",
    "weaker",
    "fails",
    "fails on plain",
    "plain fails",
    "not run",
]
"""`"within spread"`: beyond the limits, but by no more than the plain model is from itself on images next to the same.
`"fails on plain"`: it raises the same kind of error on the plain model. `"plain fails"`: only there."""

DISTANCE_WITHIN = 0.01
"""A median distance may be larger by this share."""
GOOD: tuple[Verdict, ...] = ("bit-equal", "as strong", "within spread", "stronger", "fails on plain", "plain fails")
"""What says nothing against the fast model."""
_WORST_FIRST: tuple[Verdict, ...] = (
    "fails",
    "weaker",
    "not run",
    "within spread",
    "as strong",
    "stronger",
    "bit-equal",
)


def allowed(images: int) -> int:
    """How many images more may stay robust: two in a hundred, and one of less."""
    return max(1, 2 * images // 100)


def verdict(rule: Rule, plain: Sequence[Outcome | None], fast: Sequence[Outcome | None], images: int) -> Verdict:
    """Compare the runs of one case, one per seed, on as many images."""
    same = [o.digest for o in _ran(plain)] == [o.digest for o in _ran(fast)]
    if rule == "black-box" and same and not _without_comparison(plain, fast):
        return "bit-equal"
    return over_seeds(rule, plain, fast, images)


def over_seeds(rule: Rule, plain: Sequence[Outcome | None], fast: Sequence[Outcome | None], images: int) -> Verdict:
    """The median of the fast runs against the plain ones: near enough to their median, or within their spread.

    With one run each it is that run against that one.
    """
    spoken = _without_comparison(plain, fast)
    if spoken:
        return spoken
    there, here = _ran(plain), _ran(fast)
    found = [_in_robustness([o.robust for o in there], median(o.robust for o in here), allowed(images))]
    if rule in ("minimum-norm", "black-box"):
        found.append(_in_distance([o.distance for o in there], median(o.distance for o in here)))
    if "weaker" in found:
        return "weaker"
    if "within spread" in found:
        return "within spread"
    return "stronger" if "stronger" in found else "as strong"


def _ran(outcomes: Sequence[Outcome | None]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome is not None]


def _without_comparison(plain: Sequence[Outcome | None], fast: Sequence[Outcome | None]) -> Verdict | None:
    """What is to be said where there is nothing to compare."""
    if None in plain or None in fast:
        return "not run"
    there, here = ({_kind(o.error) for o in _ran(outcomes) if o.error} for outcomes in (plain, fast))
    if TimeoutError.__name__ in there | here:
        return "not run"
    if here:
        return "fails on plain" if here <= there else "fails"
    return "plain fails" if there else None


def _kind(error: str) -> str:
    """The class of an error, with which its text begins."""
    return error.partition(":")[0]


def _in_robustness(plain: Sequence[int], fast: float, more: int) -> Verdict:
    if fast > median(plain) + more:
        return "within spread" if fast <= max(plain) else "weaker"
    return "stronger" if fast < min(*plain, median(plain) - more) else "as strong"


def _in_distance(plain: Sequence[float], fast: float) -> Verdict:
    ratio = _ratio(fast, median(plain))
    if ratio > 1 + DISTANCE_WITHIN:
        return "within spread" if fast <= max(plain) else "weaker"
    return "stronger" if ratio < 1 - DISTANCE_WITHIN and fast < min(plain) else "as strong"


def _ratio(one: float, other: float) -> float:
    """One distance over another; two infinite ones are equal."""
    if one == other:
        return 1.0
    return math.inf if math.isinf(one) or other == 0 else one / other


def worst(found: Iterable[Verdict]) -> Verdict:
    """One word for many cases; what the attack itself cannot do counts only where it can do nothing."""
    words = list(found)
    judged = [word for word in words if word in _WORST_FIRST]
    if judged:
        return min(judged, key=_WORST_FIRST.index)
    return words[0] if words else "not run"
