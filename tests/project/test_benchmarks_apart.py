"""The benchmark for GPUs, tried on a processor: ways one after the other, kept at once, and within their time."""

import json
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer
from torch import nn

from benchmarks.shared.budget import NO_TIME, Budget
from benchmarks.shared.correctness import RIGHT, UNJUDGED, confident_digits, judge
from benchmarks.shared.deadline import STOPPED, OutOfTimeError, deadline
from benchmarks.shared.report import Part, Report
from benchmarks.shared.rows import PLAIN, Prepared, Row, Setup, choose, compiled, every_row, ours, torchattacks_pgd
from benchmarks.speed import __main__ as bench
from benchmarks.speed import parts
from benchmarks.speed.ablation import ablation_part
from benchmarks.speed.apart import Forecast, measure_apart
from benchmarks.speed.cases import cases
from benchmarks.speed.limits import GPU_GROWTH, PASS, SHORT, limits_part
from benchmarks.speed.measurement import Effort, Measurement

# A deadline that strikes in a callback of the garbage collector (hypothesis has one) is told so, and strikes again.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Exception ignored in.*gc_callback:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.long,
]
CPU = torch.device("cpu")
PLAIN_ROW = Row(PLAIN, "torchattacks", torch.float32, torchattacks_pgd)
OURS = Row("ours-eager-float32", "ours", torch.float32, ours, ours=True)
Build = Callable[[nn.Module, Setup], Prepared]


def run_bench(options: str, out: Path) -> dict[str, Any]:
    app = typer.Typer()
    app.command()(bench.main)
    with pytest.raises(SystemExit) as ended:
        app([*options.split(), "--out", str(out)])
    assert ended.value.code == 0
    return read(out)


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "bench.json").read_text(encoding="utf-8"))["results"]
    return found


def row(key: str, build: Build, **options: Any) -> Row:
    return Row(key, key, torch.float32, build, **options)


def measure(rows: list[Row], *, seconds: float = 600.0, compiling: float = 0.0) -> Measurement:
    return measure_apart(
        cases("tiny")[0],
        rows,
        Effort(steps=1, repeats=2, closer=0, updates=1, matrix_size=16, mebibytes=1),
        CPU,
        budget=Budget(seconds, hard=True),
        seed=0,
        forecast=Forecast(compiling),
        urgent=(),
        tell=lambda measurement: None,
    )


def test_networks_are_measured_apart(tmp_path: Path) -> None:
    keys = f"{OURS.key},recipe-float32,foolbox"
    options = "--size tiny --steps 2 --repeats 2 --apart --no-keep-freed --networks resnet18,vit"
    found = run_bench(f"{options} --parts correctness,networks --rows {keys}", tmp_path)
    assert "failure" not in found["correctness"]
    for network in found["networks"].values():
        assert network["apart"] is True
        assert set(network["rows"]) == {PLAIN, *keys.split(",")}
        assert all(len(told["all_s"]) == 2 for told in network["rows"].values())
    assert found["networks"]["vit"]["rows"][OURS.key]["update"]["median_s"] > 0
    page = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "one after the other" in page
    assert f"| {RIGHT} |" in page


def test_the_first_network_gets_every_row_and_the_others_the_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (PLAIN_ROW, row("rare", torchattacks_pgd, core=False), OURS)
    monkeypatch.setattr(parts, "every_row", lambda device: rows)
    monkeypatch.setattr(bench, "every_row", lambda device: rows)
    options = "--size tiny --steps 1 --repeats 1 --apart --no-keep-freed --parts networks --networks resnet18,vit"
    found = run_bench(f"{options} --rows lean", tmp_path)["networks"]
    assert list(found["resnet18"]["rows"]) == [PLAIN, "rare", OURS.key]
    assert list(found["vit"]["rows"]) == [PLAIN, OURS.key]
    page = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "| not judged |" in page
    assert f"| {RIGHT} |" not in page


def test_results_are_written_after_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, list[str]] = {}

    def probe(key: str) -> Row:
        def build(model: nn.Module, setup: Setup) -> Prepared:
            networks = read(tmp_path).get("networks", {})
            written[key] = [name for network in networks.values() for name in network["rows"]]
            return torchattacks_pgd(model, setup)

        return row(key, build)

    rows = (PLAIN_ROW, probe("second"), probe("third"))
    monkeypatch.setattr(parts, "every_row", lambda device: rows)
    monkeypatch.setattr(bench, "every_row", lambda device: rows)
    options = "--size tiny --steps 1 --repeats 1 --apart --no-keep-freed --parts networks --networks resnet18"
    run_bench(options, tmp_path)
    assert written == {"second": [PLAIN], "third": [PLAIN, "second"]}


def test_a_row_is_gone_before_the_next_is_built() -> None:
    networks: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []

    def build(model: nn.Module, setup: Setup) -> Prepared:
        alive.append(sum(network() is not None for network in networks))
        prepared = ours(model, setup, engine="eager")
        networks.append(weakref.ref(prepared.network))  # type: ignore[arg-type]
        return prepared

    def fails(model: nn.Module, setup: Setup) -> Prepared:
        prepared = build(model, setup)
        raise RuntimeError(f"with {prepared} in its traceback")

    measured = measure([PLAIN_ROW, row("a", build), row("broken", fails), row("b", build)])
    assert alive == [0, 0, 0]
    assert networks[-1]() is None
    assert measured.found["broken"].failure is not None


def test_every_row_attacks_the_network_as_it_was() -> None:
    seen: list[float] = []

    def build(model: nn.Module, setup: Setup) -> Prepared:
        seen.append(sum(p.detach().double().sum().item() for p in model.parameters()))
        return ours(model, setup, engine="eager")

    measured = measure([PLAIN_ROW, row("a", build), row("b", build)])
    assert measured.found["a"].update is not None
    assert seen[0] == seen[1]


def hangs(model: nn.Module, setup: Setup) -> Prepared:
    for _ in range(600):
        time.sleep(0.1)
    raise AssertionError("nobody stopped it")


def test_a_row_that_takes_too_long_is_stopped_and_the_next_says_that_there_was_no_time() -> None:
    start = time.perf_counter()
    measured = measure([PLAIN_ROW, row("long", hangs), row("late", torchattacks_pgd)], seconds=4.0)
    assert time.perf_counter() - start < 30
    assert measured.median(PLAIN) is not None
    assert measured.found["long"].failure == STOPPED
    assert measured.found["late"].failure == NO_TIME
    assert measured.record()["rows"]["long"]["failure"] == STOPPED


def test_a_row_that_would_not_fit_is_not_begun() -> None:
    def never(model: nn.Module, setup: Setup) -> Prepared:
        raise AssertionError("it was begun")

    measured = measure([PLAIN_ROW, row("slow", never, compiles=True)], seconds=100.0, compiling=101.0)
    assert measured.found["slow"].failure == NO_TIME


def test_a_forecast_learns_from_the_network_before() -> None:
    forecast, other = Forecast(20.0), row("other", torchattacks_pgd, compiles=True)
    slow = row("slow", torchattacks_pgd, compiles=True)
    assert forecast.of(PLAIN_ROW, 0.0) == 0.0
    assert forecast.of(OURS, 2.0) == 8.0
    assert forecast.of(slow, 2.0) == 20.0
    forecast.learn(slow, 50.0)
    forecast.learn(OURS, 9.0)
    assert (forecast.of(slow, 2.0), forecast.of(other, 2.0), forecast.of(OURS, 2.0)) == (50.0, 50.0, 9.0)


def test_what_was_measured_stays_if_the_whole_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (PLAIN_ROW, row("long", hangs))
    monkeypatch.setattr(parts, "every_row", lambda device: rows)
    monkeypatch.setattr(bench, "every_row", lambda device: rows)
    start = time.perf_counter()
    options = "--size tiny --steps 1 --repeats 1 --apart --no-keep-freed --parts networks --networks resnet18,vit"
    found = run_bench(f"{options} --minutes 0.2", tmp_path)
    assert time.perf_counter() - start < 60
    assert found["networks"]["resnet18"]["rows"][PLAIN]["median_s"] > 0
    assert found["networks"]["resnet18"]["rows"]["long"]["failure"] == STOPPED
    assert found["networks"]["vit"]["rows"]["long"]["failure"] in (STOPPED, NO_TIME)


def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.Bench, "memory", lambda self: hangs(nn.Identity(), Setup(0.1, 1, CPU)))
    found = run_bench("--size tiny --apart --no-keep-freed --parts memory,growth --minutes 0.02", tmp_path)
    assert found["memory"] == {"failure": STOPPED}
    assert found["growth"] == {"failure": NO_TIME}


def test_tricks_for_which_there_is_no_time_are_left_out() -> None:
    effort = Effort(steps=1, repeats=1, closer=0, updates=1, matrix_size=16, mebibytes=1)
    part = ablation_part(cases("tiny")[0], effort, CPU, budget=Budget(0.0, hard=True), seed=0)
    assert part.record
    assert all(told == {"failure": NO_TIME} for told in part.record.values())


def test_judging_is_stopped_at_a_way_that_compiles_for_too_long() -> None:
    rows = [PLAIN_ROW, row("long", hangs, compiles=True), row("late", hangs, compiles=True), OURS]
    subject = confident_digits(CPU, images=8, epochs=1, seed=0, width=8)
    outcomes = judge(rows, subject, steps=1, seed=0, budget=Budget(3.0, hard=True)).outcomes
    assert list(outcomes) == [PLAIN, "long", "late", OURS.key]
    assert outcomes[PLAIN].verdict == outcomes[OURS.key].verdict == RIGHT
    assert [outcomes[key].failure for key in ("long", "late")] == [STOPPED, NO_TIME]
    assert outcomes["long"].verdict == UNJUDGED


# --- deadlines --------------------------------------------------------------------------------------------------------


def wait(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        time.sleep(0.01)


def test_a_deadline_inside_another_leaves_the_other_at_work() -> None:
    inner: list[bool] = []

    def work() -> None:
        try:
            with deadline(0.1):
                wait(30)
        except OutOfTimeError:
            inner.append(True)
        with deadline(30):
            inner.append(True)
        wait(30)

    with pytest.raises(OutOfTimeError), deadline(0.6):
        work()
    assert inner == [True, True]


def test_a_deadline_that_is_kept_leaves_nothing() -> None:
    with deadline(0.1):
        done = True
    wait(0.3)
    assert done


def test_a_deadline_is_not_taken_for_a_fault_of_the_model() -> None:
    assert not issubclass(OutOfTimeError, Exception)


def test_in_another_thread_nothing_is_stopped() -> None:
    done: list[bool] = []

    def work() -> None:
        with deadline(0.01):
            wait(0.1)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=30)
    assert done == [True]


def test_only_a_hard_budget_stops_what_is_at_it() -> None:
    with Budget(0.01).held():
        wait(0.1)
    with pytest.raises(OutOfTimeError), Budget(20, hard=True).share(0.01).held():
        wait(30)


# --- rows, limits, files ----------------------------------------------------------------------------------------------


def test_the_plain_model_compiled_for_little_overhead_is_a_rival_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.shared.rows.auto_dtype", lambda device: torch.float16)
    rows = {row.key: row for row in every_row(torch.device("cuda"))}
    with mock.patch("torch.compile", side_effect=lambda model, mode: model) as compile_:
        for dtype in ("float32", "float16"):
            rows[f"compile-overhead-{dtype}"].build(nn.Linear(2, 2), Setup(0.1, 1, CPU))
        compiled(nn.Linear(2, 2), Setup(0.1, 1, CPU), dtype=torch.float32)
    assert [call.kwargs["mode"] for call in compile_.call_args_list] == [
        "reduce-overhead",
        "reduce-overhead",
        "default",
    ]
    assert not any(row.core for row in rows.values() if row.compiles)
    assert not any("overhead" in row.key for row in every_row(CPU))


def test_lean_is_all_for_the_first_and_the_core_for_the_others() -> None:
    rows = every_row(CPU)
    assert choose(rows, "lean", first=True) == rows
    assert choose(rows, "lean", first=False) == choose(rows, "core")
    assert choose(rows, "all", first=False) == rows


@pytest.mark.parametrize(("grown", "outcome"), [(0, PASS), (GPU_GROWTH, PASS), (GPU_GROWTH + 2**20, SHORT)])
def test_memory_may_grow_by_what_libraries_keep_on_a_gpu(grown: int, outcome: str) -> None:
    results = {
        "default": {"engine": "cudagraph", "dtype": "float16", "row": "ours-cudagraph-float16"},
        "growth": {"grown": grown, "batch": 32 * 3 * 32 * 32 * 4, "rounds": 200},
    }
    (line,) = [line for line in limits_part(results, gpu=True).record if "growth" in line["what"]]
    assert (line["outcome"], line["needed"]) == (outcome, f"at most {GPU_GROWTH / 2**20:.1f}")


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report("bench", "title", "make bench", {}, CPU, tmp_path, bench.console)


def test_a_report_that_breaks_off_while_it_is_written_leaves_the_one_of_before(report: Report) -> None:
    report.add("first", Part([], 1), show=False)
    with mock.patch("os.fsync", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        report.add("second", Part([], 2), show=False)
    assert read(report.out) == {"first": 1}
