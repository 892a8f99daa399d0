"""The benchmark of attacks: what is kept is not run again, and its page compares with the best of the others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.attack import autoattack, cycles, evaluating, networks, strength, trades, training, training_mode
from benchmarks.attack.attacks import WAYS
from benchmarks.attack.kept import Kept
from benchmarks.attack.networks import NETWORKS, Scaled, Subject, pairs
from benchmarks.attack.page import compared, write_page
from digits import Digits, DigitsNet, accuracy, grey_digits, train
from tests.support.tools import attackable_net, batch

pytestmark = pytest.mark.long


def cell(attack: str, robust: float, *, seed: int = 0, eps: float = 0.1, network: str = "normal") -> dict[str, object]:
    place = {"network": network, "scale": "1", "norm": "linf", "eps": eps, "steps": 10}
    return {**place, "attack": attack, "seed": seed, "robust": robust}


def cells(*given: dict[str, object]) -> dict[str, dict[str, object]]:
    return {str(index): one for index, one in enumerate(given)}


def test_ours_at_its_weakest_is_compared_with_the_strongest_other() -> None:
    (one,) = compared(
        cells(
            cell("SafePGD float32", 0.5),
            cell("SafePGD float32", 0.52, seed=1),
            cell("SafePGD bfloat16", 0.53),
            cell("APGD-CE", 0.6),
            cell("APGD-DLR", 0.49),
        )
    )
    assert one.best == ("APGD-DLR", 0.49)
    assert one.behind == pytest.approx(0.04)
    assert one.seeds == 1


def test_other_losses_are_rivals_only_if_there_is_no_other_library() -> None:
    ours, loss = cell("SafePGD float32", 0.5), cell("SafePGD ce", 0.4)
    (alone,), (beside,) = compared(cells(ours, loss)), compared(cells(ours, loss, cell("PGD", 0.6)))
    assert (alone.best[0], beside.best[0]) == ("SafePGD ce", "PGD")


@pytest.mark.parametrize("robust", [0.02, 0.95])
def test_places_where_attacks_cannot_be_told_apart_are_left_out(robust: float) -> None:
    assert compared(cells(cell("SafePGD float32", robust), cell("PGD", robust))) == []


def test_a_place_without_a_rival_is_left_out(tmp_path: Path) -> None:
    given = cells(cell("SafePGD float32", 0.5), cell("PGD", 0.5, eps=0.2), cell("PGD", 0.55, network="robust"))
    assert compared(given) == []
    write_page(given, tmp_path / "page.md", images=5)
    assert "0 cells" in (tmp_path / "page.md").read_text()


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "train", lambda net, x, y, **rest: train(net, x, y, epochs=1, show_progress=False))
    options = ["--networks", "normal", "--norms", "linf", "--steps", "2", "--seeds", "1", "--images", "20"]
    options += ["--attacks", "SafePGD float32,PGD", "--scales", "1", "--cache", str(tmp_path)]
    options += ["--out", str(tmp_path / "page.md")]
    runs: list[object] = []
    robust = strength._robust

    def noted(*given: Any) -> float:
        runs.append(given)
        return robust(*given)

    monkeypatch.setattr(strength, "_robust", noted)
    app = typer.Typer()
    app.command()(strength.main)
    for _ in range(2):
        result = CliRunner().invoke(app, options)
        assert result.exit_code == 0, result.output
        assert len(runs) == 6  # three budgets, two attacks
    kept = json.loads((tmp_path / "strength-20.json").read_text())
    assert len([c for c in kept.values() if "robust" in c]) == 6
    assert (tmp_path / "page.md").read_text().startswith("# Attack strength")


def test_kept_cells_are_read_again(tmp_path: Path) -> None:
    Kept(tmp_path / "new" / "kept.json").put("a", {"robust": 0.5})
    assert Kept(tmp_path / "new" / "kept.json").cells == {"a": {"robust": 0.5}}


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(typer.BadParameter, match=f"expected one of {', '.join(NETWORKS)}, got nomal"):
        strength._known("normal,nomal", NETWORKS)


def test_pairs_have_a_hundred_classes_and_scaled_logits_the_same_decisions() -> None:
    data = pairs(grey_digits(), train_size=500)
    assert data.train_images.shape == (500, 1, 8, 16)
    assert int(data.train_labels.max()) > 90
    net, x = DigitsNet(width=4).eval(), grey_digits().test_images[:8]
    with torch.no_grad():
        assert torch.equal(Scaled(net, 0.25)(x), net(x) * 0.25)


def test_every_way_has_a_name_of_its_own_and_some_are_ours() -> None:
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert 0 < sum(way.ours for way in WAYS) < len(WAYS)


@pytest.mark.parametrize("name", [trades.BY_HAND, "float32"])
def test_both_inner_maximisers_raise_the_divergence(name: str) -> None:
    net, x = DigitsNet(width=4).eval(), grey_digits().test_images[:16]
    with torch.no_grad():
        clean = net(x).softmax(1)
    maximise = trades.by_hand(net) if name == trades.BY_HAND else trades.by_safe_pgd(net, torch.float32)
    torch.manual_seed(0)
    found = maximise(x, clean).detach()
    assert bool(((found - x).abs() <= trades.EPS + 1e-6).all())
    with torch.no_grad():
        beside = trades.divergence(net((x + 1e-3).clamp(0, 1)), clean).mean()
        assert trades.divergence(net(found), clean).mean() > 10 * beside


def test_the_command_for_cycles_writes_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "train", lambda net, x, y, **rest: train(net, x, y, epochs=2, show_progress=False))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    app = typer.Typer()
    app.command()(cycles.main)
    options = ["--budgets", "0.03", "--dtypes", "float32", "--images", "12", "--steps", "40"]
    result = CliRunner().invoke(app, [*options, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "cycles.json").read_text())["results"]["cycles"]
    assert [(r["loss"], r["share"]) for r in records] == [(name, share) for name in cycles.LOSSES for share in (4, 10)]
    for record in records:
        alone, ours = record["early_stop_alone"], record["with_cycles"]
        assert ours == alone if record["loss"] == "auto" else ours <= alone
        assert record["same_images"] == record["same_verdicts"] == 12
    assert sum(r["with_cycles"] for r in records) < sum(r["early_stop_alone"] for r in records)
    assert "| float32 | 0.03 | ce | eps/4 | 12 x 40 |" in (tmp_path / "cycles.md").read_text()


def test_float16_has_few_images_and_an_unknown_dtype_is_an_error() -> None:
    few = list(cycles.cells(["float32", "float16"], [0.1, 0.2], 300, 200))
    assert {(c.dtype, c.images, c.steps) for c in few} == {("float32", 300, 200), ("float16", 24, 60)}
    with pytest.raises(typer.BadParameter, match="expected some of float32, bfloat16, float16, got float8"):
        cycles.main(dtypes="float32,float8")


def test_training_is_kept_pair_by_pair_and_written_with_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    trained: list[tuple[str, int]] = []
    pair = training.pair

    def noted(data: Any, method: str, sizes: Any, *, seed: int) -> Any:
        trained.append((method, seed))
        return pair(data, method, sizes, seed=seed)

    monkeypatch.setattr(training, "pair", noted)
    monkeypatch.setattr(training, "judged", lambda net, data: (accuracy(net, data.test_images, data.test_labels), 0.0))
    monkeypatch.setattr(training, "TEST_SIZE", 24)
    app = typer.Typer()
    app.command()(training.main)
    options = ["--width", "4", "--epochs", "2", "--steps", "1", "--images", "24", "--batch", "24"]
    options += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]
    for seeds, methods, expected in (("2", "pgd", [("pgd", 0), ("pgd", 1)]), ("1", "pgd,trades", [("trades", 0)])):
        trained.clear()
        result = CliRunner().invoke(app, ["--seeds", seeds, "--methods", methods, *options])
        assert result.exit_code == 0, result.output
        assert trained == expected, "what is there is not trained again"
    results = json.loads((tmp_path / "training.json").read_text())["results"]
    assert [len(record["seeds"]) for record in results.values()] == [1, 1]
    assert all(len(cell[way]["robust"]) == 2 for r in results.values() for cell in r["seeds"] for way in training.WAYS)
    page = (tmp_path / "training.md").read_text()
    assert page.count("| difference, ratio |") == 2
    assert "![Adversarial training](training.png)" in page
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_both_ways_begin_at_the_same_weights_and_see_the_same_batches() -> None:
    data, sizes = grey_digits(test_size=24), training.Sizes(width=4, epochs=1, steps=1, images=48, batch=24)
    plain, fast = (training.Training(data, "pgd", way, sizes, seed=1) for way in training.WAYS)
    for first, second in zip(plain.net.parameters(), fast.net.parameters(), strict=True):
        assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(plain.order(3), fast.order(3), strict=True))
    assert not torch.equal(plain.order(3)[0], plain.order(4)[0])
    clean, robust = plain.judged(8)
    assert 0 <= robust <= clean <= 1


def test_differences_are_paired_and_ratios_leave_out_the_first_epoch() -> None:
    def made(plain: float, fast: float) -> dict[str, Any]:
        seconds = {"plain": [9.0, 4.0, 4.0], "fast": [90.0, 2.0, 2.0]}
        shares = {"plain": plain, "fast": fast}
        return {way: {"robust": [0.0, shares[way]], "seconds": seconds[way]} for way in training.WAYS}

    cells = [made(0.5, 0.52), made(0.7, 0.7), made(0.6, 0.61)]
    mean, half = training.difference(cells, "robust")
    assert mean == pytest.approx(0.01)
    assert half == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert training.difference(cells[:1], "robust")[1] is None
    assert training.ratio(cells, "seconds") == 2


def test_an_unknown_way_of_training_lists_the_choices() -> None:
    with pytest.raises(typer.BadParameter, match="expected some of pgd, trades, got awp"):
        training.main(methods="pgd,awp")


def test_the_command_for_autoattack_times_each_attack_and_compares_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = grey_digits(test_size=6)
    target = Subject("robust", DigitsNet(width=4).eval(), data.test_images, data.test_labels)
    monkeypatch.setattr(autoattack, "subject", lambda name, folder, images: target)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    app = typer.Typer()
    app.command()(autoattack.main)
    sizes = {"digits-steps": 1, "width": 4, "batch": 2, "steps": 1, "targets": 1, "queries": 1}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    result = CliRunner().invoke(app, [*options, "--repeats", "1", "--cache", str(tmp_path), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "autoattack.json").read_text())["results"]
    assert found["times"].keys() == autoattack.ATTACKS.keys()
    assert all(ways.keys() == autoattack.WAYS.keys() for ways in found["times"].values())
    assert [record["way"] for record in found["robustness"]] == list(autoattack.WAYS)
    assert all(0 <= record["robust"] <= 1 for record in found["robustness"])


def test_the_command_for_training_mode_trains_and_attacks_in_each_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    few = Digits(*(tensor[:64] for tensor in grey_digits(test_size=16)))
    monkeypatch.setattr(training_mode, "grey_digits", lambda test_size: few)
    app = typer.Typer()
    app.command()(training_mode.main)
    sizes = {"seeds": 1, "epochs": 2, "steps": 1, "judging": 1, "width": 4}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    result = CliRunner().invoke(app, [*options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "training-mode.json").read_text())["results"]["training-mode"]
    assert [record["mode"] for record in records] == list(training_mode.MODES)
    assert all(0 <= record[name] <= 1 for record in records for name in training_mode.VERDICTS)


def test_an_attack_in_training_mode_moves_the_running_statistics_unless_they_are_kept() -> None:
    net, data = DigitsNet(width=4), grey_digits(test_size=8)
    before = [buffer.clone() for buffer in net.buffers()]
    training_mode.keeping(net, data.test_images, data.test_labels, steps=1)
    assert all(map(torch.equal, net.buffers(), before))
    training_mode.pgd(net, data.test_images, data.test_labels, steps=1, training=False)
    assert all(map(torch.equal, net.buffers(), before))
    training_mode.pgd(net, data.test_images, data.test_labels, steps=1, training=True)
    assert not any(map(torch.equal, net.buffers(), before))


def test_passes_of_an_evaluation_are_a_share_of_those_of_fixed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = batch(32)
    net = attackable_net()
    one = networks.Subject("normal", net, x, net(x).argmax(1))
    monkeypatch.setattr(evaluating, "subject", lambda *_, **__: one)
    monkeypatch.setattr(evaluating, "STEPS", 20)
    result = CliRunner().invoke(evaluating.app, ["passes"])
    assert result.exit_code == 0, result.output
    assert "same verdicts for batch sizes (1, 7, 128): [True, True, True]" in " ".join(result.output.split())
    monkeypatch.setitem(evaluating.BOUND, "normal", 0.001)
    assert CliRunner().invoke(evaluating.app, ["passes"]).exit_code == 1
