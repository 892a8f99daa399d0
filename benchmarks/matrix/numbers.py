"""`docs/benchmarks/matrix.md` and `matrix.json`: every outcome as a number."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.matrix.cases import LOOKS, Case, Row
from benchmarks.matrix.cells import DTYPES, PLAIN, Outcome
from benchmarks.matrix.plan import ROWS
from benchmarks.matrix.results import Results
from benchmarks.matrix.subjects import RECIPES
from benchmarks.shared.report import Table
from fastadv_adapters.comparison import describe_device, versions

_KEPT = (
    "robust",
    "distance",
    "seconds",
    "samples",
    "zero",
    "nonfinite",
    "digest",
    "broken",
    "chosen",
    "warned",
    "error",
)
_NOTE = (
    "Each entry: robust images (in targeted cases those that miss the target, but with FAB and LGV those of the true "
    "class); the median distance, if more than half of the images were broken; seconds on one thread, while each "
    "other core may be at another attack; how many gradients were zero and how many not finite, if any. The plain "
    "model stands twice: on all images, and on those for half precision. The closer looks of "
    "[compatibility](../compatibility.md) are in the JSON alone."
)


def write_numbers(results: Results, out: Path) -> list[Path]:
    """Write both files of what has been run."""
    out.mkdir(parents=True, exist_ok=True)
    page, record = out / "matrix.md", out / "matrix.json"
    tables = [_table(results, name) for name in RECIPES]
    title = "# The matrix: every attack in numbers\n\nMade by `make matrix`; all numbers are in `matrix.json`.\n"
    device = ", ".join(f"{key} {value}" for key, value in describe_device(torch.device("cpu")).items())
    software = ", ".join(f"{key} {value}" for key, value in versions().items())
    heads = [f"- device: {device}", f"- versions: {software}", "", _NOTE, ""]
    page.write_text("\n".join([title, *heads, *(table.markdown() for table in tables)]), encoding="utf-8")
    record.write_text(_json(results), encoding="utf-8")
    return [page, record]


def _table(results: Results, subject: str) -> Table:
    all_images, few = results.plan.count("float32"), results.plan.count("float16")
    heads = ("attack", "case", f"plain, {all_images}", f"float32, {all_images}", f"plain, {few}")
    rows = [
        (f"{row.library} {row.attack}", case.label or "untargeted", *_entries(results, row, case, subject))
        for row in ROWS
        for case in row.cases
    ]
    return Table(f"The {subject} network", (*heads, f"float16, {few}", f"bfloat16, {few}"), rows)


def _ways(results: Results) -> Iterator[tuple[str, int]]:
    """The ways in the order of the columns, with their numbers of images."""
    yield PLAIN, results.plan.count("float32")
    yield "float32", results.plan.count("float32")
    yield PLAIN, results.plan.count("float16")
    yield from ((dtype, results.plan.count(dtype)) for dtype in ("float16", "bfloat16"))


def _entries(results: Results, row: Row, case: Case, subject: str) -> Iterator[str]:
    for way, count in _ways(results):
        found = [o for o in results.outcomes(row, case, subject, way, count) if o]
        yield _entry(found) if found else "not run"


def _entry(found: list[Outcome]) -> str:
    if any(outcome.error for outcome in found):
        return "error"
    first = found[0]
    parts = ["/".join(str(outcome.robust) for outcome in found)]
    if first.distance < float("inf"):
        parts.append(f"{first.distance:.4g}")
    parts.append(f"{first.seconds:.2f} s")
    if first.zero or first.nonfinite:
        parts.append(f"{first.zero}+{first.nonfinite} of {first.samples}")
    return ", ".join(parts)


def _json(results: Results) -> str:
    """Device, versions, and a line per outcome under named columns."""
    keys = ("subject", "library", "attack", "case", "way", "images", "seed")
    head = {
        "device": describe_device(torch.device("cpu")),
        "versions": versions(),
        "settings": {"images": results.plan.images, "dtypes": list(DTYPES)},
        "columns": [*keys, *_KEPT],
    }
    lines = ",\n".join(json.dumps(line) for line in _lines(results))
    return json.dumps(head, indent=2)[:-2] + f',\n  "results": [\n{lines}\n  ]\n}}\n'


def _lines(results: Results) -> Iterator[list[object]]:
    for row in ROWS:
        for case in row.cases:
            for subject in RECIPES:
                second = [(dtype, results.plan.images) for dtype in DTYPES]
                for way, count in dict.fromkeys([*_ways(results), *second]):
                    found = results.outcomes(row, case, subject, way, count, LOOKS[-1])
                    for seed, outcome in zip(LOOKS[-1], found, strict=True):
                        if outcome:
                            key = [subject, row.library, row.attack, case.label, way, count, seed]
                            yield [*key, *_plain_values(outcome)]


def _plain_values(outcome: Outcome) -> list[object]:
    """The fields that are kept; JSON has no infinity, so an infinite distance is null."""
    values = asdict(outcome)
    values["distance"] = outcome.distance if outcome.distance < float("inf") else None
    values["seconds"] = round(outcome.seconds, 3)
    return [values[name] for name in _KEPT]
