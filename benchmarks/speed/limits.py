"""What must hold, held against what was measured."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.shared.correctness import FAILED, WRONG
from benchmarks.shared.report import Part, Table
from benchmarks.shared.rows import FOOLBOX, PLAIN
from benchmarks.speed.scaling import BATCH, STEPS

PASS, SHORT, OPEN = "PASS", "missed", "not measured"

GPU_GROWTH = 4 * 2**20
"""Bytes by which the memory of tensors may grow on a GPU. Not every growth is a leak there: a library's workspace that
is made on first use counts as a tensor and stays, and the allocator may serve the same request from a larger block
without splitting it. A leak of one batch, or of one small network, in each of hundreds of rounds is far above it."""

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Limit:
    """One thing that must hold.

    Attributes:
        what: of which number it speaks.
        needed: the limit, as text.
        found: what was measured, as text; empty if it was not.
        holds: whether it does; None if it was not measured.
    """

    what: str
    needed: str
    found: str = ""
    holds: bool | None = None

    @property
    def word(self) -> str:
        """The outcome in a word."""
        return OPEN if self.holds is None else PASS if self.holds else SHORT


def least(what: str, value: float | None, limit: float, form: Callable[[float], str]) -> Limit:
    """A number that must not be below a limit."""
    needed = f"at least {form(limit)}"
    return Limit(what, needed) if value is None else Limit(what, needed, form(value), value >= limit)


def most(what: str, value: float | None, limit: float, form: Callable[[float], str]) -> Limit:
    """A number that must not be above a limit."""
    needed = f"at most {form(limit)}"
    return Limit(what, needed) if value is None else Limit(what, needed, form(value), value <= limit)


def times(value: float) -> str:
    """As a factor."""
    return f"{value:.2f}x"


def percent(value: float) -> str:
    """As a share."""
    return f"{value:.2%}" if value < 0.1 else f"{value:.1%}"


def tenths(value: float) -> str:
    """As a number."""
    return f"{value:.1f}"


def limits_part(results: Results, *, gpu: bool) -> Part:
    """What this project aims at on a processor, or on a GPU, and what was measured."""
    found = list(on_gpu(results) if gpu else on_processor(results))
    rows = [(limit.what, limit.needed, limit.found, limit.word) for limit in found]
    size = "full" if gpu else "small"
    note = f"Aims of this project, for size {size} on a quiet machine."
    table = Table("Aims", ("what", "aim", "measured", "outcome"), rows, note)
    return Part([table], [{**asdict(limit), "outcome": limit.word} for limit in found])


def on_processor(results: Results) -> Iterator[Limit]:
    """Of two processor cores."""
    default, steps = results["default"]["row"], "torchattacks.PGD on ResNet-18"
    first = _row(results, "resnet18")
    yield least(f"{steps}, default options, to plain", _value(first(default), "ratio_to_plain"), 1.25, times)
    yield least(f"{steps}, float32, to plain", _value(first("ours-eager-float32"), "ratio_to_plain"), 1.25, times)
    yield _against_rivals(results)
    for dtype in dict.fromkeys((results["default"]["dtype"], "float32")):
        ratio = _quotient(_median(first(FOOLBOX)), _median(first(f"foolbox-ours-{dtype}")))
        yield least(f"foolbox LinfPGD on ResNet-18, {dtype}, to plain", ratio, 1.7, times)
    share = _value(first("ours-eager-float32"), "share_of_matrix_peak")
    yield least("eager engine, float32, of the matrix peak", share, 0.9, percent)
    yield _update_share(results, "resnet18", "ResNet-18")
    for dtype, ratio in results.get("updates", {}).get("to_plain_copy", {"float32": None}).items():
        yield most(f"update() of a WRN-28-10, {dtype}, to a plain copy", ratio, 1.3, times)
    yield from _counted(results)


def _counted(results: Results) -> Iterator[Limit]:
    """What does not depend on the clock, and how time grows."""
    stop = results.get("early_stop", {})
    yield least("early stop: fewer samples forward and backward", stop.get("ratio"), 8, times)
    same = stop.get("same_broken")
    yield Limit(
        "early stop: broken samples", "the same", "" if same is None else "the same" if same else "others", same
    )
    kept = results.get("memory", {}).get("bytes", {})
    share = _quotient(kept.get("ours, float16"), kept.get("plain"))
    yield most("bytes kept for backward, ResNet-18, float16, of plain", share, 0.25, percent)
    yield from _growing(results, gpu=False)


def _growing(results: Results, *, gpu: bool) -> Iterator[Limit]:
    """How time and memory grow."""
    scaling = results.get("scaling", {})
    steps = scaling.get(STEPS, {}).get("ratio")
    told, within = ("", None) if steps is None else (times(steps), 1.8 <= steps <= 2.2)
    yield Limit("twice the steps: time", "from 1.80x to 2.20x", told, within)
    yield most("twice the batch: time", scaling.get(BATCH, {}).get("ratio"), 2.2, times)
    yield _growth(results.get("growth", {}), gpu=gpu)


def _growth(growth: Mapping[str, Any], *, gpu: bool) -> Limit:
    """Of the memory of tensors on a GPU; of the process elsewhere, which may grow by part of a batch a round."""
    rounds = growth.get("rounds", 200)
    what = f"memory after {rounds} updates and attacks: growth"
    if gpu:
        return most(f"{what}, in MiB", _quotient(growth.get("grown"), 2**20), GPU_GROWTH / 2**20, tenths)
    share = _quotient(growth.get("grown"), growth.get("batch"))
    return most(f"{what}, in batches of images", share, 0.1 * rounds, tenths)


def on_gpu(results: Results) -> Iterator[Limit]:
    """Of a CUDA GPU, against plain PyTorch's defaults and against the recipe with a fixed loss scale."""
    default, half = results["default"]["row"], results["default"]["dtype"]
    for key, name, to_plain, to_recipe in (
        ("resnet18", "ResNet-18", 6.0, 2.5),
        ("wrn", "WRN-28-10", 4.0, 1.3),
        ("resnet50", "ResNet-50", 4.0, 1.3),
        ("vit", "ViT-S", 3.0, 1.3),
        ("resnet18-512", "ResNet-18, larger batch", None, 1.3),
    ):
        row = _row(results, key)
        if to_plain is not None:
            yield least(f"{name}: to plain", _value(row(default), "ratio_to_plain"), to_plain, times)
        ratio = _quotient(_median(row(f"recipe-{half}-scaled")), _median(row(default)))
        yield least(f"{name}: to the recipe with loss scale 2^16", ratio, to_recipe, times)
        if key == "wrn":
            yield least(f"{name}: of the matrix peak", _value(row(default), "share_of_matrix_peak"), 0.5, percent)
        memory = _quotient(_value(row(default), "memory"), _value(row(PLAIN), "memory"))
        yield most(f"{name}: peak memory, of plain", memory, 0.4, percent)
        yield _update_share(results, key, name)
    yield from _right(results)
    yield from _growing(results, gpu=True)


def _right(results: Results) -> Iterator[Limit]:
    judged = results.get("correctness", {})
    own, plain = judged.get(results["default"]["row"], {}), judged.get(PLAIN, {})
    zero, robust = own.get("newly_zero"), own.get("robust")
    yield most("digits network: gradients that are zero and not in plain", zero, 0, percent)
    above = None if robust is None or "robust" not in plain else robust - plain["robust"]
    yield most("digits network: robust accuracy above plain", above, 0.01, percent)


def _against_rivals(results: Results) -> Limit:
    """Ours against each other way to run the same attack that is not found wrong, round by round; the worst counts."""
    judged, default = results.get("correctness", {}), results["default"]["row"]
    rows = results.get("networks", {}).get("resnet18", {}).get("rows", {})
    own = rows.get(default, {}).get("all_s", ())
    ratios = {
        row["label"]: median(mine / theirs for mine, theirs in zip(own, row["all_s"], strict=False))
        for key, row in rows.items()
        if own and not row["ours"] and key != FOOLBOX and "all_s" in row
        if judged.get(key, {}).get("verdict") not in (WRONG, FAILED)
    }
    best = max(ratios, key=lambda label: ratios[label], default="any")
    right, unjudged = ("right ", "") if judged else ("", "; right or wrong not judged")
    what = f"ResNet-18, default options: time to the fastest {right}way that is not ours ({best}{unjudged})"
    return most(what, ratios.get(best), 1.03, times)


def _update_share(results: Results, key: str, name: str) -> Limit:
    row = _row(results, key)(results["default"]["row"])
    update = row.get("update") or {}
    share = _quotient(update.get("median_s"), _median(row))
    return most(f"{name}: update(), of the attack that it precedes", share, 0.01, percent)


def _row(results: Results, network: str) -> Callable[[str], Mapping[str, Any]]:
    """What was measured of a way on a network; empty if nothing was."""
    rows: Mapping[str, Mapping[str, Any]] = results.get("networks", {}).get(network, {}).get("rows", {})
    return lambda key: rows.get(key, {})


def _value(row: Mapping[str, Any], name: str) -> float | None:
    value: float | None = row.get(name)
    return value


def _median(row: Mapping[str, Any]) -> float | None:
    return _value(row, "median_s")


def _quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below
