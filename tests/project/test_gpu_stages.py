"""The stages for a GPU, rehearsed on a processor: each runs whole, and keeps what it has after every item."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

from benchmarks.gpu import compiling, stages
from benchmarks.gpu.clock import device_ms, host_ms, recorded, searching
from benchmarks.gpu.items import Items
from benchmarks.gpu.kernels import TOP, by_kind
from benchmarks.gpu.smoke import exact_gradient, least_cosine
from benchmarks.shared.budget import NO_TIME, Budget
from benchmarks.shared.deadline import STOPPED
from benchmarks.shared.report import Report
from benchmarks.speed.cases import cases

pytestmark = pytest.mark.long

CPU = torch.device("cpu")


def run(options: str, out: Path) -> object:
    app = typer.Typer()
    app.command()(stages.main)
    with pytest.raises(SystemExit) as ended:
        app([*options.split(), "--out", str(out)])
    return ended.value.code


def read(stage: str, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"gpu-{stage}.json").read_text(encoding="utf-8"))["results"]
    return found


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages at the sizes of a rehearsal, compiled without code generation, which takes seconds per network."""
    out = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "BACKEND", "aot_eager")
        assert run("--tiny --device cpu", out) == 0
    return out


@pytest.mark.parametrize("stage", stages.STAGES)
def test_every_item_of_every_stage_finds_something(stage: str, rehearsed: Path) -> None:
    results = read(stage, rehearsed)
    assert "failure" not in results
    assert results["items"]
    assert {key: item for key, item in results["items"].items() if not item.get("found")} == {}
    page = (rehearsed / f"gpu-{stage}.md").read_text(encoding="utf-8")
    assert f"Made by `python -m benchmarks.gpu.stages --stages {stage} --tiny --device cpu`" in page
    assert all(f"| {key} |" in page for key in results["items"])


def test_gradients_are_right_and_stay_so_after_an_update(rehearsed: Path) -> None:
    items = read("smoke", rehearsed)["items"]
    assert set(items) == {"eager, float16", "eager, bfloat16", "eager, float32"}
    for key, item in items.items():
        limit = 0.9999 if "float32" in key else 0.9
        assert item["found"]["least cosine"] > limit
        assert item["found"]["least cosine after an update"] > limit


def test_steps_are_timed_and_compiled_ones_compared(rehearsed: Path) -> None:
    for item in read("time", rehearsed)["items"].values():
        assert item["found"]["ms"] > 0
        assert item["found"]["host ms"] > 0
    for item in read("compile", rehearsed)["items"].values():
        assert item["found"]["least cosine"] > 0.9


def test_each_way_that_is_prepared_is_compared_with_none(rehearsed: Path) -> None:
    items = read("prepared", rehearsed)["items"]
    for item in items.values():
        assert item["found"]["least cosine"] > 0.99
        assert item["found"]["off, recorded, ms"] > 0
        assert item["found"]["on, recorded, ms"] > 0
    assert items["wrn, ReLUs fused"]["found"]["refused by cuDNN"] == 3  # on a processor there is none
    assert not items["vit, norms and stream in 16 bits"]["found"]["the same"]


def test_stages_can_be_run_one_by_one(tmp_path: Path) -> None:
    assert run("--tiny --device cpu --stages env,smoke", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["gpu-env.json", "gpu-smoke.json"]


@pytest.mark.parametrize("options", ["--stages env,none --device cpu", "--stages , --device cpu"])
def test_the_command_names_what_it_does_not_know(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(options, tmp_path) == 2
    assert "expected stages" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_the_command_says_how_to_rehearse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("", tmp_path) == 2
    assert "expected a CUDA device" in capsys.readouterr().err


def test_a_stage_that_breaks_says_why_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(items: Items) -> None:
        items.add("first", lambda: {"one": 1})
        raise RuntimeError("no such device")

    monkeypatch.setattr(stages, "STAGES", {"broken": breaks, "env": stages.STAGES["env"]})
    assert run("--tiny --device cpu --stages broken,env", tmp_path) == 0
    broken = read("broken", tmp_path)
    assert broken["failure"] == "RuntimeError: no such device"
    assert broken["items"]["first"]["found"] == {"one": 1}
    assert "failure" not in read("env", tmp_path)


def hangs() -> Mapping[str, Any]:
    for _ in range(600):
        time.sleep(0.1)
    raise AssertionError("nobody stopped it")


def test_a_stage_whose_time_is_up_writes_the_item_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def long(items: Items) -> None:
        items.add("first", lambda: {"one": 1}, need=0.0)
        items.add("long", hangs, need=0.0)
        items.add("late", hangs, need=0.0)

    monkeypatch.setattr(stages, "STAGES", {"long": long, "env": stages.STAGES["env"]})
    assert run("--tiny --device cpu --stages long,env --seconds 3", tmp_path) == 0
    found = {key: item.get("failure") for key, item in read("long", tmp_path)["items"].items()}
    assert found == {"first": None, "long": STOPPED, "late": NO_TIME}
    assert read("env", tmp_path) == {"failure": NO_TIME}


def test_what_hangs_between_items_is_stopped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "GRACE", 0.5)
    monkeypatch.setattr(stages, "STAGES", {"long": lambda items: hangs()})
    assert run("--tiny --device cpu --stages long --seconds 1", tmp_path) == 0
    assert read("long", tmp_path) == {"failure": STOPPED}


# --- items ------------------------------------------------------------------------------------------------------------


def items_of(tmp_path: Path, seconds: float = 600.0) -> Items:
    report = Report("gpu-try", "title", "command", {}, CPU, tmp_path, stages.console)
    return Items("try", report, Budget(seconds, hard=True), "tiny")


def test_items_are_written_one_by_one(tmp_path: Path) -> None:
    items = items_of(tmp_path)

    def second() -> Mapping[str, Any]:
        return {"written before": list(read("try", tmp_path)["items"])}

    items.add("first", lambda: {"one": 1})
    items.add("second", second)
    assert read("try", tmp_path)["items"]["second"]["found"] == {"written before": ["first"]}


def test_an_item_that_raises_says_where_and_keeps_its_warnings(tmp_path: Path) -> None:
    items = items_of(tmp_path)
    items.add("broken", lambda: torch.ones(2) @ torch.ones(3))  # type: ignore[arg-type, return-value]
    items.add("warns", lambda: {"leaf": torch.ones(1, requires_grad=True).sum().grad})
    found = read("try", tmp_path)["items"]
    assert found["broken"]["failure"].startswith("RuntimeError: ")
    assert any("torch.ones(3)" in line for line in found["broken"]["at"])
    assert "non-leaf" in found["warns"]["warnings"][0] or "not a leaf" in found["warns"]["warnings"][0]


def test_an_item_that_takes_too_long_is_stopped_and_one_that_would_not_fit_is_left_out(tmp_path: Path) -> None:
    items = items_of(tmp_path, seconds=3.0)
    items.add("long", hangs, need=0.5)
    items.add("late", lambda: {"one": 1})
    assert items.records["long"]["failure"] == STOPPED
    assert items.records["late"]["failure"] == NO_TIME


# --- tools ------------------------------------------------------------------------------------------------------------


def test_kernels_are_added_up_by_kind_and_the_slowest_are_named() -> None:
    kernels = [
        ("sm90_xmma_fprop", 2, 3.0),
        ("cudnn::nchwToNhwc", 1, 1.0),
        ("triton_poi_relu", 4, 0.5),
        ("mine", 1, 9.0),
    ]
    found = by_kind([*kernels, *((f"small {index}", 1, 0.001) for index in range(TOP))])
    assert found["convolution, product, attention, ms"] == 3.0
    assert found["layout, ms"] == 1.0
    assert found["elementwise, ms"] == 0.5
    assert found["calls"]["elementwise"] == 4
    assert found["slowest"][0] == ["mine", 1, 9.0]
    assert len(found["slowest"]) == TOP


def test_the_clock_counts_one_run() -> None:
    def work() -> None:
        time.sleep(0.02)

    assert recorded(work, CPU) is work
    assert device_ms(work, CPU, runs=2, rounds=2) >= 20
    assert host_ms(work, CPU, runs=2) >= 20


def test_the_search_for_the_fastest_ends() -> None:
    before = torch.backends.cudnn.benchmark
    with searching():
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == before


def test_a_wrong_gradient_shows() -> None:
    model, x, y = cases("tiny")[0].make(CPU)
    exact = exact_gradient(model, x, y)
    assert exact.dtype == torch.float64
    assert least_cosine(exact, exact) > 1 - 1e-9
    wrong = exact.clone()
    wrong[1] *= -1
    assert least_cosine(wrong, exact) < 0
    assert next(nn.Module.parameters(model)).dtype == torch.float32
