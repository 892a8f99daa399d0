"""The benchmarks run, at sizes that measure nothing, and write what they say they write."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

from benchmarks import quote as quoting
from benchmarks.precision import __main__ as precision
from benchmarks.quote import Quotation, excerpt, quote
from benchmarks.shared.budget import Budget
from benchmarks.shared.correctness import FAILED, RIGHT, WRONG, confident_digits, judge
from benchmarks.shared.rows import PLAIN, Prepared, Row, Setup, choose, every_row, torchattacks_pgd
from benchmarks.speed import __main__ as bench
from benchmarks.speed import computed, convolutions, layers
from benchmarks.speed.floor import Work, work_of
from benchmarks.speed.layer_kinds import LAYERS
from benchmarks.speed.limits import PASS, SHORT, limits_part
from benchmarks.speed.memory import kept_per_image
from benchmarks.speed.plot import draw
from benchmarks.speed.sweep import batches_up_to, saturating
from fastadv_adapters.comparison import measure_in_turn

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def run(command: Any, options: str, out: Path) -> object:
    """Run a command of typer's in this process; returns its exit status."""
    app = typer.Typer()
    app.command()(command)
    with pytest.raises(SystemExit) as ended:
        app([*options.split(), "--out", str(out)])
    return ended.value.code


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the whole benchmark, without the ways that compile."""
    out = tmp_path_factory.mktemp("bench")
    keys = ",".join(row.key for row in every_row(CPU) if row.core and not row.compiles and row.timed)
    torch.manual_seed(0)
    options = (
        f"--size tiny --steps 2 --repeats 2 --threads 1 --no-keep-freed --sweep --networks resnet18,vit --rows {keys}"
    )
    assert run(bench.main, options, out) == 0
    return out


def test_bench_measures_every_part(benched: Path) -> None:
    results = json.loads((benched / "bench.json").read_text(encoding="utf-8"))
    assert set(results) == {"device", "versions", "settings", "took", "results"}
    found = results["results"]
    assert set(found["networks"]) == {"resnet18", "vit"}
    failed = {name for name, part in found.items() if isinstance(part, dict) and "failure" in part}
    assert failed == set()
    for network in found["networks"].values():
        for row in network["rows"].values():
            assert row["median_s"] > 0
            assert row["bytes_kept_per_image"] > 0
        assert network["rows"][PLAIN]["ratio_to_plain"] == 1.0
    own = found["networks"]["resnet18"]["rows"][f"ours-eager-{found['default']['dtype']}"]
    assert own["update"]["median_s"] > 0
    assert not {line["outcome"] for line in found["limits"]} - {PASS, SHORT, "not measured"}
    assert found["updates"]["addresses_unchanged"] is True


def test_bench_writes_page_and_picture(benched: Path) -> None:
    page = (benched / "bench.md").read_text(encoding="utf-8")
    assert "Made by `make bench`" in page
    assert "(bench.png)" in page
    assert page.index("## Aims") < page.index("## PGD-2 on ResNet-18") < page.index("## PGD-2 on ViT")
    assert (benched / "bench.png").read_bytes().startswith(b"\x89PNG")
    table = excerpt(page, Quotation("bench", ("PGD-2 on ViT",), head=False))
    assert table.startswith("**PGD-2 on ViT")
    assert "Aims" not in table


def test_freed_memory_is_kept_where_malloc_can_be_told() -> None:
    """In a process of its own: it would stay so for all tests."""
    code = """
import resource, torch
from benchmarks.shared.heap import keep_freed_memory
told = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(24)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
assert not told or faults() + faults() < 2**14, "each time would be 24576 pages"
print(told)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == str(sys.platform == "linux")


def test_networks_with_computed_weights_are_compared(tmp_path: Path) -> None:
    assert run(computed.main, "--batch 1 --size 32 --blocks 1 --repeats 1", tmp_path) == 0
    found = json.loads((tmp_path / "computed.json").read_text(encoding="utf-8"))["results"]["networks"]
    assert found.keys() == computed.KINDS.keys()
    assert all(way["median_s"] > 0 for ways in found.values() for way in ways.values())
    assert "| standardised weights |" in (tmp_path / "computed.md").read_text(encoding="utf-8")


def test_convolutions_are_compared_layer_by_layer(tmp_path: Path) -> None:
    assert run(convolutions.main, "--batch 1 --repeats 1 --widest 64", tmp_path) == 0
    (layer,) = json.loads((tmp_path / "convolutions.json").read_text(encoding="utf-8"))["results"]["layers"].values()
    assert layer["used"] is False
    assert all(ours < 2 * own for ours, own in zip(layer["winograd"]["errors"], layer["own"]["errors"], strict=True))
    assert "| 64 to 64 channels, 32x32, stride 1 |" in (tmp_path / "convolutions.md").read_text(encoding="utf-8")


def test_kernels_are_compared_layer_by_layer(tmp_path: Path) -> None:
    assert run(layers.main, "--repeats 1 --only depthwise", tmp_path) == 0
    found = json.loads((tmp_path / "layers.json").read_text(encoding="utf-8"))["results"]["layers"]
    assert set(found) == {name for name in LAYERS if "depthwise" in name}
    for layer in found.values():
        own, ours = (layer[f"{whose} bfloat16"]["errors"] for whose in ("own", "ours"))
        assert all(error < 1.2 * other for error, other in zip(ours, own, strict=True))
    assert "| depthwise 3x3, stride 2 |" in (tmp_path / "layers.md").read_text(encoding="utf-8")


def test_layers_that_there_are_not_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(layers.main, "--only nothing", tmp_path) == 2
    assert "expected" in capsys.readouterr().err


def test_precision_runs_and_writes_its_results(tmp_path: Path) -> None:
    assert run(precision.main, "--images 8 --steps 2 --epochs 1 --resnet-images 0", tmp_path) == 0
    assert json.loads((tmp_path / "precision.json").read_text(encoding="utf-8"))["results"]
    assert "| way |" in (tmp_path / "precision.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("options", ["--size huge", "--networks lenet", "--parts all,none", "--rows fastest"])
def test_the_command_names_what_it_does_not_know(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bench.main, options, tmp_path) == 2
    assert "expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("speed", "--sweep"),
        ("speed.computed", "--blocks"),
        ("speed.convolutions", "--widest"),
        ("speed.layers", "--only"),
        ("speed.keeping", "--dtype"),
        ("precision", "--resnet-images"),
        ("matrix", "--attacks"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package:RuntimeWarning")
def test_the_commands_show_their_options(
    command: str, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{command}", run_name="__main__")  # as python -m does
    assert ended.value.code == 0
    assert option in capsys.readouterr().out


def test_a_way_that_fails_says_why_and_a_wrong_one_is_marked() -> None:
    def raises(model: nn.Module, setup: Setup) -> Prepared:
        raise RuntimeError("no such engine\nhere")

    def vanishes(model: nn.Module, setup: Setup) -> Prepared:
        return Prepared(lambda x, y: x, lambda x: model(x) + 0 * x.sum(), loss=lambda logits, y: 0 * logits.sum())

    rows = [
        Row(PLAIN, "plain", torch.float32, torchattacks_pgd),
        Row("broken", "broken", torch.float32, raises),
        Row("wrong", "wrong", torch.float32, vanishes),
    ]
    subject = confident_digits(CPU, images=8, epochs=1, seed=0, width=8)
    judgement = judge(rows, subject, steps=2, seed=0)
    verdicts = {key: found.verdict for key, found in judgement.outcomes.items()}
    assert verdicts == {PLAIN: RIGHT, "broken": FAILED, "wrong": WRONG}
    assert judgement.outcomes["broken"].failure == "RuntimeError: no such engine"
    assert judgement.outcomes["wrong"].newly_zero == 1.0


def test_wrong_ways_are_drawn(tmp_path: Path) -> None:
    rows = {PLAIN: {"label": "plain", "ours": False, "ratio_to_plain": 1.0}}
    rows["recipe"] = {"label": "recipe", "ours": False, "ratio_to_plain": 2.0}
    pictures = []
    for verdict in (RIGHT, WRONG):
        path = tmp_path / f"{verdict}.png"
        draw({"net": {"title": "net", "rows": rows}}, {"recipe": {"verdict": verdict}}, path, title="title")
        pictures.append(path.read_bytes())
    assert pictures[0] != pictures[1]


def test_limits_are_held_against_what_was_measured() -> None:
    rows: dict[str, Any] = {
        "plain": {"ours": False, "label": "plain", "median_s": 4.0, "all_s": [4.0]},
        "recipe": {"ours": False, "label": "recipe", "median_s": 1.0, "all_s": [1.0]},
        "ours-eager-float32": {"ours": True, "label": "ours", "median_s": 2.0, "all_s": [2.0], "ratio_to_plain": 2.0},
    }
    results: dict[str, Any] = {
        "default": {"engine": "eager", "dtype": "float32", "row": "ours-eager-float32"},
        "correctness": {"recipe": {"verdict": WRONG}},
        "networks": {"resnet18": {"rows": rows}},
    }

    def outcome(what: str) -> str:
        (line,) = [line for line in limits_part(results, gpu=False).record if what in line["what"]]
        return str(line["outcome"])

    assert outcome("torchattacks.PGD on ResNet-18, float32, to plain") == PASS
    assert outcome("fastest right way") == PASS
    results["correctness"] = {"recipe": {"verdict": RIGHT}}
    assert outcome("fastest right way") == SHORT
    results["correctness"] = {}
    assert outcome("fastest way that is not ours (recipe; right or wrong not judged)") == SHORT
    assert outcome("early stop: fewer") == "not measured"
    assert {line["outcome"] for line in limits_part(results, gpu=True).record} >= {"not measured"}


def test_work_is_counted_as_it_must_be_done() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU())
    x = torch.rand(2, 3, 4, 4)
    products = 2 * 16 * 8 * 3 * 9  # images, places, outputs, inputs, window
    weights, inputs, outputs = 8 * 3 * 9, x.numel(), 2 * 8 * 16
    assert work_of(layer, x) == Work(2 * 2 * products, 2 * (weights + inputs + outputs))
    assert all(p.requires_grad and p.grad is None for p in layer.parameters())
    assert layer.training


def test_kept_bytes_are_counted_once_and_without_weights() -> None:
    layer = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    prepared = Prepared(lambda x, y: x, layer)
    assert kept_per_image(prepared, torch.rand(8, 4)) == 4 * (4 + 16)  # the input, and what ReLU gives, in float32


def test_rounds_are_cut_to_keep_to_the_time_and_ways_that_raise_are_left_out() -> None:
    failures: dict[str, str] = {}
    ways = {"right": lambda: None, "wrong": lambda: 1 // 0}
    timings = measure_in_turn(ways, device=CPU, repeats=9, budget=Budget(0), failures=failures)
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"right": 2}
    assert failures["wrong"].startswith("ZeroDivisionError: ")


def test_rows_can_be_chosen() -> None:
    rows = every_row(CPU)
    assert len({row.key for row in rows}) == len(rows)
    assert choose(rows, "all") == rows
    assert [row.key for row in choose(rows, "ours-eager-float32")] == [PLAIN, "ours-eager-float32"]
    with pytest.raises(ValueError, match="got fastest"):
        choose(rows, "fastest")


def test_a_sweep_knows_odd_batches_and_saturation() -> None:
    assert batches_up_to(64) == [1, 2, 4, 8, 16, 31, 32, 63, 64]
    assert saturating({1: 10.0, 8: 96.0, 64: 100.0}) == 8


def test_results_are_quoted_where_the_pages_want_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in quoting.QUOTED:
        (tmp_path / page).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / page, tmp_path / page)
    out = tmp_path / "docs" / "benchmarks"
    out.mkdir()
    (out / "demo.md").write_text("| seconds now |\n", encoding="utf-8")
    parts = "![all](all.png)", "## digits network, logits x 3", "[words](../start.md)", "## another network"
    (out / "precision.md").write_text("\n\n".join(["# Precision", *parts]), encoding="utf-8")
    monkeypatch.setattr(quoting, "ROOT", tmp_path)
    monkeypatch.setattr(quoting, "OUT", out)
    quoting.main()
    assert "| seconds now |" in (tmp_path / "docs" / "start.md").read_text(encoding="utf-8")
    page = (tmp_path / "docs" / "trust" / "half-precision.md").read_text(encoding="utf-8")
    assert "![all](../benchmarks/all.png)\n\n**digits network, logits x 3**\n\n[words](../start.md)\n" in page
    assert "another network" not in page


def test_quoting_replaces_what_stood_there() -> None:
    page = "a\n<!-- table: demo -->\nold\n<!-- end table -->\nb"
    assert quote(page, "demo", "new") == "a\n<!-- table: demo -->\n\nnew\n\n<!-- end table -->\nb"
    with pytest.raises(ValueError, match="expected <!-- table: other -->"):
        quote(page, "other", "new")


def test_what_is_asked_for_keeps_its_order() -> None:
    assert bench.pick(("a", "b", "c"), "all", "letters") == ["a", "b", "c"]
    assert bench.pick(("a", "b", "c"), "c, a,c", "letters") == ["c", "a"]
    for wrong in ("d", "a,d", ","):
        with pytest.raises(typer.BadParameter, match="expected letters"):
            bench.pick(("a", "b", "c"), wrong, "letters")
