"""`docs/compatibility.md`: a row per attack, in words."""

from collections.abc import Callable, Iterator
from pathlib import Path

import foolbox as fb
import torch
import torchattacks

from benchmarks.matrix.cases import Case, Library, Row
from benchmarks.matrix.cells import DTYPES, MOVE, Outcome
from benchmarks.matrix.numbers import write_numbers
from benchmarks.matrix.plan import ROWS, Plan
from benchmarks.matrix.results import Results
from benchmarks.matrix.subjects import RECIPES, WIDTH
from fastadv_adapters.comparison import describe_device, versions
from fastadv_adapters.modules import needs_exact_gradients

NAME = "compatibility.md"
COLUMNS = ("attack", "compared as", "works", *DTYPES, "options", "notes")
_MODULES = {"torchattacks": torchattacks, "foolbox": fb.attacks}
_OPTIONS = {"decisions": "`decisions={!r}`", "logits_dtype": "`logits_dtype={}`"}

INTRODUCTION = """\
# Compatibility

This page says of every attack that torchattacks and foolbox list whether it is as strong on a fast model as on the
plain one. `make matrix` runs the attacks and writes this page. The numbers are in
[benchmarks/matrix.md](benchmarks/matrix.md). The columns float32, float16 and bfloat16 are dtypes of the fast model.
The guide explains [decisions](guides/options.md#decisions) and [logits](guides/options.md#logits-in-float64).

- [How it was measured](#how-it-was-measured)
- [torchattacks](#torchattacks)
- [foolbox](#foolbox)

## How it was measured

{measured}

| compared as | as strong means |
|---|---|
| gradient | same seed: at most 2 more of 100 images robust than on the plain model (in half precision 1 more of 25) |
| minimum-norm | the same, and a median distance at most 1 % larger; what was not broken is infinitely far |
| black-box | as for minimum-norm; *bit-equal*: all adversarial images are the same, bit for bit |

*Full precision*, in the column *options*, says that gradients were in full precision, which these attacks
[get by default](how-it-works.md#who-is-asking). So nothing of these attacks ran in half precision, not even in the
columns *float16* and *bfloat16*.

*Works* says that the attack runs on a fast model without an error that the plain model does not raise too. The limit on
robust accuracy is wider than that of [compare](guides/compare.md#what-it-finds) (1 image in 100), because it has to
serve every attack. The limit on distances is narrower (there 5 %).

*Stronger* says that the attack is better than on the plain model by more than the limit, and at a closer look also
that the median of the fast runs is better than every run of the plain model. *Fails on plain* says that the
attack raises the same error on the plain model, *plain fails* that it raises an error on the plain model alone.

Some attacks amplify rounding, so a single run may favour either model by chance. If the first run is beyond the limits,
a *closer look* is taken: both models are attacked on all images with three seeds. With every seed but the first, each
pixel of the clean images is first moved by at most {move:g}. The median of the fast runs then has to be within the
limits of the plain median. *Within spread* says that it is beyond them, but not beyond the worst of the plain model's
own runs. *Weaker* says that it is beyond those too. Before an attack is called weaker, nine seeds are taken. A median
distance of *inf* says that half of the images or more were not broken. If both medians are *inf*, robust images alone
are compared.

An attack has one verdict per dtype: the worst of its cases (untargeted, targeted, other norms) on both networks. Cases
that fail on the plain model do not count. An image counts as broken if it is within bounds and budget, and its true
class leads all other classes by no more than 1e-4 in the plain model's logits. In targeted cases the target may be at
most 1e-4 below the largest logit; with FAB and LGV any class other than the true one counts.
"""


def write_pages(images: int, cache: Path, out: Path) -> list[Path]:
    """Write the page, and the numbers behind it, of what has been run with so many images."""
    results = Results(Plan(images), cache)
    page = out / NAME
    out.mkdir(parents=True, exist_ok=True)
    parts = [
        INTRODUCTION.format(measured=_measured(results), move=MOVE),
        _library(results, "torchattacks", _TORCHATTACKS),
    ]
    page.write_text("\n".join([*parts, _library(results, "foolbox", _FOOLBOX)]), encoding="utf-8")
    return [page, *write_numbers(results, out / "benchmarks")]


_TORCHATTACKS = """\
The plain attack is made on the plain model, the fast one is `accelerate(attack, dtype=...)`. The column *options* has
what `accelerate` chose (for AutoAttack, for each kind of attack inside), and what else was given to it. *Targets* are
given by label, but to FAB by a function and to LGV as the least likely class."""
_FOOLBOX = """\
The plain attack gets a `foolbox.PyTorchModel`, the fast one a `FastPyTorchModel` with the dtype and the *options* named
here. (`accelerate`, which is not used here, would give [some attacks](guides/foolbox.md#an-attack-made-fast) logits in
float64.) A row has all names of an attack."""


def _measured(results: Results) -> str:
    device = ", ".join(f"{key} {value}" for key, value in describe_device(torch.device("cpu")).items())
    software = ", ".join(f"{key} {value}" for key, value in versions().items())
    normal, robust = RECIPES["confident"], RECIPES["adversarial"]
    lines = [
        f"Two residual networks of width {WIDTH} on scikit-learn's digits, 8x8 in three channels: one trained for "
        f"{normal.epochs} epochs, which is very confident, and one trained adversarially, {robust.epochs} epochs with "
        f"PGD of eps {robust.train_eps:g}.",
        f"{results.plan.count('float32')} images that the network classifies correctly are attacked in float32, the "
        f"first {results.plan.count('float16')} of them in half precision. The plain model is attacked on both sets.",
        "Robust accuracy and distances are judged by the plain model. Budgets are small, and such that strong attacks "
        "break some images and not all: they compare models, and are no advice.",
        f"Budgets of the confident network: {_budgets('confident')}; of the adversarial one: "
        f"{_budgets('adversarial')}. Targeted cases have twice that, noise three times.",
        f"{device}; {software}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _budgets(name: str) -> str:
    return ", ".join(f"{norm} {size:g}" for norm, size in RECIPES[name].budgets.items() if size)


def _library(results: Results, library: Library, text: str) -> str:
    rows = [_row(results, row) for row in ROWS if row.library == library]
    table = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return "\n".join([f"## {library}", "", text, "", *table, ""])


def _row(results: Results, row: Row) -> tuple[str, ...]:
    rules = dict.fromkeys(case.rule for case in row.cases)
    words = [results.worst(row, dtype) for dtype in DTYPES]
    names = ", ".join(f"`{name}`" for name in (row.attack, *aliases(row)))
    return names, ", ".join(rules), _works(results, row), *words, _options(results, row), _notes(results, row)


def aliases(row: Row) -> list[str]:
    """Other names of a foolbox attack."""
    if row.library == "torchattacks":
        return []
    own = getattr(fb.attacks, row.attack)
    return [name for name, value in vars(fb.attacks).items() if value is own and name != row.attack]


def _works(results: Results, row: Row) -> str:
    found = [results.verdict(row, c, s, d) for c in row.cases for s in RECIPES for d in DTYPES]
    if "fails" in found:
        return "no"
    if all(word == "not run" for word in found):
        return "not run"
    return "not on the plain model either" if set(found) <= {"fails on plain", "not run"} else "yes"


def _options(results: Results, row: Row) -> str:
    given = {_given(row, case): case for case in row.cases}
    parts = [f"{text} ({case.rule})" if len(given) > 1 else text for text, case in given.items() if text]
    chosen = dict.fromkeys(outcome.chosen for _, outcome in results.fast_outcomes(row) if outcome.chosen)
    if row.library == "torchattacks" and chosen:
        parts.insert(0, " or ".join(chosen))
    return "; ".join(parts) or "none"


def _given(row: Row, case: Case) -> str:
    words = [_OPTIONS[name].format(value).replace("'", '"') for name, value in case.options.items()]
    full = case.full_precision or needs_exact_gradients(getattr(_MODULES[row.library], row.attack))
    return ", ".join([*words, *["full precision"] * full])


def _notes(results: Results, row: Row) -> str:
    told = [row.note] if row.note else []
    told += dict.fromkeys([*_errors(results, row), *_exceptions(results, row)])
    return " ".join(told) or "-"


def _errors(results: Results, row: Row) -> Iterator[str]:
    """What the attack raises, on which model."""
    for case in row.cases:
        for subject in RECIPES:
            for dtype in DTYPES:
                plain, fast = (
                    next((o.error for o in found if o and o.error), "")
                    for found in results.pair(row, case, subject, dtype)
                )
                where = f"{case.label or 'untargeted'}, {subject} network"
                if plain:
                    yield f"{where}: fails on the plain model{' too' if fast else ' only'}: `{_escaped(plain)}`."
                elif fast:
                    yield f"{where}: fails on the fast model: `{_escaped(fast)}`."


def _exceptions(results: Results, row: Row) -> Iterator[str]:
    """The cases that are not as strong, at the first look or at the last, with what was counted."""
    for dtype in DTYPES:
        for case, subject, word in results.verdicts(row, dtype):
            first = results.first_verdict(row, case, subject, dtype)
            if first != "weaker":
                continue
            label = f"{dtype}, {case.label or 'untargeted'}, {subject} network"
            counted = _counted(*results.last_look(row, case, subject, dtype)[1:], case)
            yield f"{label}: {word}{' at a closer look' if first != word else ''} ({counted})."


def _counted(plain: list[Outcome | None], fast: list[Outcome | None], case: Case) -> str:
    """Robust images seed by seed and, where the attack seeks the least, distances; of either model."""
    ways = {"fast": [o for o in fast if o is not None], "plain": [o for o in plain if o is not None]}

    def told(word: Callable[[Outcome], str]) -> str:
        lists = (", ".join("error" if o.error else word(o) for o in found) for found in ways.values())
        return "; ".join(f"{way} {words}" for way, words in zip(ways, lists, strict=True))

    text = f"robust images, seed by seed: {told(lambda o: str(o.robust))}"
    if case.rule in ("minimum-norm", "black-box"):
        text += f"; median distances: {told(lambda o: f'{o.distance:.4g}')}"
    errors = dict.fromkeys(_escaped(o.error) for found in ways.values() for o in found if o.error)
    return text + "".join(f"; error: `{error}`" for error in errors)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")
