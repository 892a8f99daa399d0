"""The benchmarks of single questions, at the smallest sizes: they run, and what they find is what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks.precision import outputs
from benchmarks.speed import audits, people, people_limits, recommended
from benchmarks.speed.limits import PASS, SHORT
from fastadv_adapters.networks import auditing, nearness, trial
from fastadv_adapters.networks.auditing import Auditor

pytestmark = pytest.mark.long


def run(main: Any, options: str, name: str, out: Path) -> dict[str, Any]:
    app = typer.Typer()
    app.command()(main)
    with pytest.raises(SystemExit) as ended:
        app([*options.split(), "--out", str(out)])
    assert ended.value.code == 0
    assert (out / f"{name}.md").exists()
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))["results"][name]
    return found


def test_audits_are_timed_and_nothing_stays_patched(tmp_path: Path) -> None:
    before = vars(Auditor)["__call__"], vars(Auditor)["_judge"]
    found = run(audits.main, "--tiny --batch 2 --epochs 1 --repeats 1 --only ResNet-18", "audits", tmp_path)
    assert (vars(Auditor)["__call__"], vars(Auditor)["_judge"]) == before
    ((name, row),) = found.items()
    assert "ResNet-18" in name
    assert row["ran in"] == ["bfloat16"]
    assert row["warnings"] == []
    assert row["of the attack"] == pytest.approx(row["audit"] / (row["audit"] + 50 * row["step"]))
    assert row["of one step"] > 0.01, "an audit has been made"


def test_models_of_people_are_timed(tmp_path: Path) -> None:
    found = run(people.main, "--repeats 1 --only 784-128 --no-keep-freed", "people", tmp_path)
    ((name, row),) = found.items()
    assert name == "MLP 784-128-10, batch 16"
    assert row["ratio"]["float32"] == pytest.approx(row["milliseconds"]["plain"] / row["milliseconds"]["float32"])
    assert row["forward"] > 0
    assert row["start steps"] == pytest.approx(row["start seconds"] / row["milliseconds"]["plain"] * 1e3)
    assert row["start steps"] > 1
    page = (tmp_path / "people.md").read_text(encoding="utf-8")
    assert "| MLP 784-128-10, batch 16 | gradient pass, added | at most 0.10 ms |" in page


def test_what_is_short_has_its_reason() -> None:
    row = {"ratio": {"default": 1.26, "float32": 0.9}, "forward": 1.0, "milliseconds": {"default": 2.0, "plain": 1.95}}
    rows = {"digits net, width 32, batch 32": row, "convnext_atto, 96, batch 16": row, "nfnet_l0, 96, batch 8": row}
    lines = people_limits.must_hold(rows).rows
    assert [(line[1], line[2], line[4], bool(line[5])) for line in lines] == [
        ("gradient pass", "at least 1.300x", SHORT, True),
        ("in float32", "at least 0.950x", SHORT, True),
        ("without gradient", "at least 1.150x", SHORT, True),
        ("gradient pass", "at least 1.200x", PASS, False),
        ("in float32", "at least 0.950x", SHORT, True),
        ("without gradient", "at least 0.950x", PASS, False),
        ("gradient pass, added", "at most 0.10 ms", PASS, False),
        ("without gradient", "at least 0.950x", PASS, False),
    ]
    assert {model.name.split(", ")[0] for model in people.MODELS} >= {n.split(",")[0] for n in people_limits.GRADIENT}


def test_what_compare_recommends_is_measured_again() -> None:
    model, x, y = people.MODELS[1].make()
    found = recommended.measure(model, x[:8], y[:8], repeats=1)
    assert (found["again"] == 1.0) == (found["recommended"] is None)
    assert found["again"] > 0
    assert found["ratios"].keys() >= {"plain", "default"}
    slow = {**found, "again": 0.9, "recommended": "default"}
    assert [row[-1] for row in recommended.table_of({"one": slow, "other": {**slow, "again": 0.96}}).rows] == [
        "NO",
        "yes",
    ]


def test_every_model_that_needs_no_other_library_is_whole() -> None:
    for model in people.MODELS:
        if not model.timm:
            net, x, y = model.make()
            assert not net.training
            assert y.shape == (model.batch,)
            assert people.gradient(net, x[:2], y[:2]).shape == x[:2].shape
            assert people.values(net, x[:2]).dtype == torch.float32


def test_networks_of_which_half_precision_puts_outputs_off_are_let_through_and_nothing_stays_patched(
    tmp_path: Path,
) -> None:
    found = run(outputs.main, "--images 16 --seeds 1", "outputs", tmp_path)
    off = [row["off"] for row in found["rows"]]
    assert min(off) < nearness.FAR < max(off)
    assert vars(trial)["FAR"] == vars(auditing)["FAR"] == nearness.FAR
