"""The matrix leaves no attack out, its page is complete, and cells are run, judged, kept and compared as they say."""

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import foolbox as fb
import pytest
import torch
import torchattacks

from benchmarks.matrix import attacking, cells
from benchmarks.matrix.cases import Case, Eps, scaled, sized
from benchmarks.matrix.cells import Cell, Outcome, read, signature, write
from benchmarks.matrix.page import COLUMNS, aliases, write_pages
from benchmarks.matrix.plan import ROWS, Plan, cells_of
from benchmarks.matrix.results import Results
from benchmarks.matrix.running import prepare, run_one
from benchmarks.matrix.subjects import RECIPES, colour_digits, subject, weights_of
from benchmarks.matrix.verdicts import GOOD, allowed, over_seeds, verdict, worst
from digits import DigitsNet, train

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
NEEDS_PAGE = pytest.mark.skipif(not PAGE.exists(), reason="docs/compatibility.md is not there: make matrix writes it")
LIBRARIES = ("torchattacks", "foolbox")
BY_NAME = {row.attack: row for row in ROWS}
IMAGES = 8


def listed(library: str) -> set[str]:
    """Every name under which the library lists an attack."""
    if library == "torchattacks":
        return set(torchattacks.__all__)
    kinds = {name: value for name, value in vars(fb.attacks).items() if isinstance(value, type)}
    base = fb.attacks.base.Attack
    return {name for name, kind in kinds.items() if issubclass(kind, base) and kind is not base}


def table(page: Path, library: str) -> list[list[str]]:
    """The rows of a library on the page, as cells."""
    text = page.read_text(encoding="utf-8")
    section = text[text.index(f"\n## {library}\n") :].split("\n## ")[1]
    rows = re.findall(r"^\| (`.*) \|$", section, re.MULTILINE)
    return [re.split(r" (?<!\\)\| ", row) for row in rows]


def named(page: Path, library: str) -> list[str]:
    return [name for row in table(page, library) for name in re.findall(r"`(\w+)`", row[0])]


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_attack_of_the_library_has_a_row(library: str) -> None:
    own = [name for row in ROWS if row.library == library for name in (row.attack, *aliases(row))]
    assert len(own) == len(set(own))
    assert set(own) == listed(library)


@NEEDS_PAGE
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_row_is_on_the_page(library: str) -> None:
    own = [name for row in ROWS if row.library == library for name in (row.attack, *aliases(row))]
    assert sorted(named(PAGE, library)) == sorted(own)


@NEEDS_PAGE
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_row_of_the_page_is_complete(library: str) -> None:
    rows = table(PAGE, library)
    assert [row for row in rows if len(row) != len(COLUMNS) or not all(row)] == []
    assert [row[0] for row in rows if "not run" in row] == []


@NEEDS_PAGE
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_attack_is_weaker_on_the_fast_model(library: str, dtype: str) -> None:
    index = COLUMNS.index(dtype)
    assert [row[0] for row in table(PAGE, library) if row[index] not in GOOD] == []


def test_every_targeted_mode_of_torchattacks_is_tried(subjects: Path) -> None:
    victim = subject("confident", subjects)
    for row in ROWS:
        if row.library == "torchattacks":
            case = row.cases[0]
            make = attacking._MADE.get(row.attack, attacking._one)
            made = make(row.attack, victim.net, sized(case.settings, 0.1), victim)
            tried = any(case.targeted != "no" for case in row.cases)
            assert tried == ("targeted" in made.supported_mode), row.attack


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights for both networks, of one short training."""
    cache = tmp_path_factory.mktemp("matrix")
    torch.manual_seed(0)
    data, net = colour_digits(), DigitsNet(channels=3, width=8)
    train(net, data.train_images, data.train_labels, epochs=2, show_progress=False)
    for name in RECIPES:
        torch.save(net.state_dict(), weights_of(name, cache))
    prepare(cache)
    return cache


def run_cell(name: str, cache: Path, *, way: str, case: int = 0, limit: int = 60) -> Outcome:
    """One cell of the confident network, kept in the cache too."""
    row = BY_NAME[name]
    (cell,) = cells_of(row, row.cases[case], "confident", way, IMAGES)
    outcome = run_one((cell, row, row.cases[case]), cache, limit)
    assert read(cell, row.cases[case], cache) == outcome
    return outcome


@pytest.mark.parametrize("name", ["BIM", "DDNAttack", "DatasetAttack"])
def test_a_cell_runs_from_end_to_end(name: str, subjects: Path) -> None:
    plain, fast = (run_cell(name, subjects, way=way) for way in ("plain", "float16"))
    rule = BY_NAME[name].cases[0].rule
    for found in (plain, fast):
        assert found.error == ""
        assert found.robust < IMAGES, "the test needs an attack that breaks something"
        assert found.distance < 10 or found.robust > IMAGES / 2
        assert (found.samples > 0) == (rule != "black-box")
    assert plain.chosen == ""
    assert fast.chosen.startswith("auto")
    assert rule == "black-box" or plain.digest != fast.digest


def test_what_an_attack_raises_is_kept(subjects: Path) -> None:
    label = [case.label for case in BY_NAME["FAB"].cases].index("L1")
    outcome = run_cell("FAB", subjects, way="plain", case=label)
    assert outcome.error.startswith("UnboundLocalError")


def test_an_attack_that_does_not_end_is_given_up(subjects: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "attack", lambda *arguments: time.sleep(10))
    assert run_cell("VANILA", subjects, way="plain", limit=1).error == "TimeoutError: not done after 1 s"


def test_outcomes_are_found_again_until_the_case_changes(tmp_path: Path) -> None:
    cell = Cell("confident", "foolbox", "DDNAttack", "targeted", "float16", 25, 0)
    case = BY_NAME["DDNAttack"].cases[1]
    assert read(cell, case, tmp_path) is None
    outcome = Outcome(robust=3, distance=math.inf, signature=signature(cell, case))
    write(cell, outcome, tmp_path)
    assert read(cell, case, tmp_path) == outcome
    assert read(cell, case.but(settings={"steps": 7}), tmp_path) is None
    assert read(replace(cell, seed=1), case, tmp_path) is None


def test_the_page_tells_what_has_been_run(tmp_path: Path) -> None:
    for cell, _, case in Plan(100, attacks=("FAB", "DDNAttack")).cells():
        error = "UnboundLocalError: cannot | x" if case.label == "L1" else ""
        robust = 9 if cell.way == "bfloat16" or (cell.way, cell.seed) == ("float16", 0) else 3
        kept = Outcome(robust, distance=1.0, chosen="exact decisions", error=error, signature=signature(cell, case))
        write(cell, kept, tmp_path)
    for seeds, ways in ({0, 1, 2}, {"plain", "float16", "bfloat16"}), (set(range(9)), {"plain", "bfloat16"}):
        looks = {task[0]: task[2] for task in Results(Plan(100), tmp_path).next_looks()}
        assert {(cell.way, cell.images) for cell in looks} == {(way, 100) for way in ways}
        assert {cell.seed for cell in looks} == seeds
        for cell, case in looks.items():
            robust = 9 if cell.way == "bfloat16" or (cell.way, cell.seed) == ("float16", 0) else 3
            write(cell, Outcome(robust, distance=1.0, signature=signature(cell, case)), tmp_path)
    assert list(Results(Plan(100), tmp_path).next_looks()) == []
    paths = write_pages(100, tmp_path, tmp_path / "docs")
    assert [path.name for path in paths] == ["compatibility.md", "matrix.md", "matrix.json"]
    rows = {row[0].split(", ")[0].strip("`"): row for library in LIBRARIES for row in table(paths[0], library)}
    assert set(rows) == set(BY_NAME)
    assert "not run" in rows["CW"]
    ddn, fab = (dict(zip(COLUMNS, rows[name], strict=True)) for name in ("DDNAttack", "FAB"))
    assert (ddn["works"], ddn["float32"], ddn["bfloat16"]) == ("yes", "as strong", "weaker")
    assert ddn["options"] == "none", "as strong with default options, that is"
    nine = "(robust images, seed by seed: fast 9, 9, 9, 9, 9, 9, 9, 9, 9; plain"
    assert f"bfloat16, targeted, adversarial network: weaker {nine}" in ddn["notes"]
    three = "(robust images, seed by seed: fast 9, 3, 3; plain"
    assert f"float16, untargeted, confident network: as strong at a closer look {three}" in ddn["notes"]
    assert ddn["float16"] == "as strong"
    assert "L1, confident network: fails on the plain model too: `UnboundLocalError: cannot \\| x`" in fab["notes"]
    numbers = json.loads(paths[2].read_text(encoding="utf-8"))
    assert len(numbers["results"][0]) == len(numbers["columns"])
    assert "| foolbox DDNAttack | targeted | 3, 1, 0.00 s |" in paths[1].read_text(encoding="utf-8")


def outcome(robust: int, distance: float = math.inf, digest: str = "a", error: str = "") -> Outcome:
    return Outcome(robust=robust, distance=distance, digest=digest, error=error)


@pytest.mark.parametrize(
    ("rule", "plain", "fast", "expected"),
    [
        ("gradient", [outcome(10)], [outcome(12)], "as strong"),
        ("gradient", [outcome(10)], [outcome(13)], "weaker"),
        ("gradient", [outcome(10)], [outcome(7)], "stronger"),
        ("minimum-norm", [outcome(0, 1.0)], [outcome(0, 1.01)], "as strong"),
        ("minimum-norm", [outcome(0, 1.0)], [outcome(0, 1.02)], "weaker"),
        ("minimum-norm", [outcome(0, 1.0)], [outcome(0, 0.9)], "stronger"),
        ("minimum-norm", [outcome(60)], [outcome(60)], "as strong"),
        ("minimum-norm", [outcome(49, 1.0)], [outcome(51)], "weaker"),
        ("black-box", [outcome(5)], [outcome(5)], "bit-equal"),
        ("black-box", [outcome(5)], [outcome(5, digest="b")], "as strong"),
        ("black-box", [outcome(5)], [outcome(8, digest="b")], "weaker"),
        ("black-box", [outcome(0, 1.0)], [outcome(0, 1.02, digest="b")], "weaker"),
        ("gradient", [outcome(5)], [outcome(0, error="E")], "fails"),
        ("gradient", [outcome(0, error="E")], [outcome(0, error="E")], "fails on plain"),
        ("gradient", [outcome(0, error="E")], [outcome(5)], "plain fails"),
        ("gradient", [outcome(0, error="E: 1")], [outcome(0, error="F: 1")], "fails"),
        ("gradient", [outcome(0, error="E: 1")], [outcome(0, error="E: 2")], "fails on plain"),
        ("gradient", [outcome(0, error="TimeoutError: x")], [outcome(0, error="TimeoutError: x")], "not run"),
        ("gradient", [outcome(5)], [None], "not run"),
    ],
)
def test_verdicts(rule: str, plain: list[Outcome], fast: list[Outcome], expected: str) -> None:
    assert verdict(rule, plain, fast, 100) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "plain", "fast", "expected"),
    [
        ("gradient", [10, 10, 14], [14, 14, 14], "within spread"),
        ("gradient", [10, 10, 14], [15, 15, 15], "weaker"),
        ("gradient", [10, 10, 14], [12, 12, 19], "as strong"),
    ],
)
def test_verdicts_over_seeds(rule: str, plain: list[int], fast: list[int], expected: str) -> None:
    there, here = list(map(outcome, plain)), list(map(outcome, fast))
    assert over_seeds(rule, there, here, 100) == expected  # type: ignore[arg-type]


FMN = ("L0FMNAttack", "L1FMNAttack", "L2FMNAttack", "LInfFMNAttack")
SURE = ("DDNAttack", *FMN, "L2DeepFoolAttack", "LinfDeepFoolAttack", "DeepFool")


@NEEDS_PAGE
@pytest.mark.parametrize("name", SURE)
def test_in_float16_every_image_is_broken_that_is_broken_on_the_plain_model(name: str) -> None:
    record = json.loads((PAGE.parent / "benchmarks" / "matrix.json").read_text(encoding="utf-8"))
    rows = [dict(zip(record["columns"], row, strict=True)) for row in record["results"]]
    rows = [row for row in rows if row["attack"] == name and row["seed"] == 0 and not row["case"]]
    keys = {(row["subject"], row["images"]) for row in rows if row["way"] == "float16"}
    assert {subject for subject, _ in keys} == set(RECIPES)
    for subject_name, images in keys:
        found = {r["way"]: r["broken"] for r in rows if (r["subject"], r["images"]) == (subject_name, images)}
        assert [pair for pair in zip(found["plain"], found["float16"], strict=True) if pair == ("1", "0")] == []


def test_the_limits_and_the_worst_verdict() -> None:
    assert [allowed(images) for images in (100, 25, 200)] == [2, 1, 4]
    assert worst(["as strong", "weaker", "stronger"]) == "weaker"
    assert worst(["as strong", "fails on plain"]) == "as strong"
    assert worst(["fails on plain", "fails on plain"]) == "fails on plain"


def test_budgets_grow_with_the_network_and_the_case() -> None:
    case = scaled(Case("gradient", "linf", {"eps": Eps(), "alpha": Eps(0.5), "steps": 3}, budget=1.0), 2)
    assert sized(case.settings, 0.1) == pytest.approx({"eps": 0.2, "alpha": 0.1, "steps": 3})
    assert case.budget == 2
