"""What the commands do when all is well, and their exit status."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from fastadv_adapters import compare
from fastadv_adapters.cli.data import ImageFolder, data_named, first_of
from fastadv_adapters.cli.demo import trained
from fastadv_adapters.cli.models import model_named
from fastadv_adapters.cli.numbers import bounds, number, requirement, shape

from .conftest import Run

NET = "networks_of_a_user.py:Net"


def test_info_tells_versions_devices_and_extras(fastadv: Run, folder: Path) -> None:
    result = fastadv("info", "--json", "info.json")
    assert result.exit_code == 0, result.output
    assert f"torch: {version('torch')}" in result.stdout
    found = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    assert found["auto"]["cpu"]["engine"] == "eager"
    assert set(found["extras"]) >= {"torchattacks", "foolbox", "cli"}


def test_compare_on_random_images_writes_json_and_a_picture(fastadv: Run, folder: Path) -> None:
    result = fastadv("compare", NET, "--input", "3x2x2", "--repeats", "1", "--json", "c.json", "--plot", "c.png")
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "c.json").read_text(encoding="utf-8"))
    assert found["verdict"] in " ".join(result.stdout.split())
    assert found["samples"] == 64
    assert found["setting"]["eps"] == 8 / 255
    assert (folder / "c.png").stat().st_size > 1000


def test_compare_that_finds_it_unfaithful_ends_with_status_1(fastadv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(*args: Any, **kwargs: Any) -> Any:
        found = compare(*args, **kwargs)
        found.row("default").faults.append("made up")
        return found

    monkeypatch.setattr("fastadv_adapters.cli.app.compare", weak)
    result = fastadv("compare", NET, "--data", "data.npz", "--repeats", "1")
    assert result.exit_code == 1, result.output
    assert "NOT faithful (made up)" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    "data", ["data.npz", "data.safetensors", "networks_of_a_user:data", "networks_of_a_user.py:pair"]
)
def test_evaluate_takes_data_of_every_kind(fastadv: Run, data: str) -> None:
    result = fastadv("evaluate", NET, "--data", data, "--attacks", "safe-pgd-2", "--limit", "5", "--no-progress")
    assert result.exit_code == 0, result.output
    assert "on 5 samples" in result.stdout


def test_evaluate_and_report_write_the_same_numbers_and_hold_requirements(fastadv: Run, folder: Path) -> None:
    what = (
        "evaluate",
        "networks_of_a_user:made",
        "--data",
        "data.npz",
        "--attacks",
        "safe-pgd-2",
        "--eps",
        "2/255,1/5",
    )
    files = ("--json", "r.json", "--plot", "r.png", "--triples", "t.png")
    result = fastadv(*what, "--weights", "weights.pt", "--output", "run", *files, "--require", "clean>=0")
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "r.json").read_text(encoding="utf-8"))
    assert 0 <= found["robust_accuracy"] <= found["clean_accuracy"] <= 1
    assert [eps for eps, _ in found["curve"]] == [2 / 255, 0.2]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("r.png", "t.png"))
    again = fastadv("report", "run", "--json", "again.json", "--require", "robust_accuracy > 1")
    assert again.exit_code == 1
    assert again.stdout.endswith("written: again.json\n")
    assert "falls short: robust_accuracy > 1, got 0." in again.stderr
    assert json.loads((folder / "again.json").read_text(encoding="utf-8")) == found
    assert fastadv(*what, "--weights", "weights.safetensors", "--output", "run").exit_code == 0, "the same weights"
    rows = folder / "run" / "rows.jsonl"
    rows.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    unfinished = fastadv("report", "run", "--require", "clean>=0")
    assert unfinished.exit_code == 1
    assert unfinished.stdout.startswith("not finished, 11 of 12 samples: between ")
    assert "interval" not in unfinished.stdout
    assert unfinished.stderr == "falls short: not all samples are finished\n"


@pytest.mark.parametrize("factory", ["Net", "parallel", "Holds"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "_orig_mod.", "module._orig_mod.", "net."])
def test_weights_saved_from_a_model_in_another_one(factory: str, prefix: str, folder: Path) -> None:
    weights: dict[str, Any] = {f"{prefix}1.weight": torch.zeros(3, 12), f"{prefix}1.bias": torch.eye(3)[2]}
    torch.save(weights, "w.pt")
    torch.save(weights | {"n_averaged": torch.tensor(2)}, "averaged.pt")
    torch.save(weights | {"head.weight": torch.zeros(3, 12)}, "more.pt")
    for file in ("w.pt", "averaged.pt"):
        made = model_named(f"networks_of_a_user.py:{factory}", Path(file), torch.device("cpu"))
        assert list(made.state_dict().values())[1].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match=r"expected weights with the keys of .* more.pt .*with .*head.weight"):
        model_named(f"networks_of_a_user.py:{factory}", Path("more.pt"), torch.device("cpu"))


def test_weights_are_loaded(fastadv: Run, folder: Path) -> None:
    torch.save({"state_dict": {"module.1.weight": torch.zeros(3, 12), "module.1.bias": torch.eye(3)[2]}}, "w.pt")
    options = ("--data", "data.npz", "--attacks", "safe-pgd-1", "--eps", "0", "--require", "clean>1/2")
    assert fastadv("evaluate", NET, "--weights", "w.pt", *options).exit_code == 1
    result = fastadv("evaluate", NET, "--weights", "w.pt", *options[:-2], "--json", "r.json")
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "r.json").read_text(encoding="utf-8"))["clean_accuracy"] == pytest.approx(1 / 3)


def test_a_folder_of_images_gives_each_class_in_turn(fastadv: Run, folder: Path) -> None:
    for label, name in enumerate(("ant", "bee", "cat")):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (2, 2), (50 * label, 100 * index, 255)).save(folder / "images" / name / f"{index}.png")
    (folder / "images" / "ant" / "notes.txt").write_text("no image", encoding="utf-8")
    images = ImageFolder(folder / "images")
    assert [images[index][1] for index in range(len(images))] == [0, 1, 2, 0, 1, 2]
    torch.testing.assert_close(images[5][0], torch.tensor([100, 100, 255]).view(3, 1, 1).expand(3, 2, 2) / 255)
    result = fastadv("compare", NET, "--data", "images", "--repeats", "1")
    assert result.exit_code == 0, result.output
    (folder / "images" / "cat" / "1.png").write_bytes(b"broken")
    for command in (("compare", "--repeats", "1"), ("evaluate", "--attacks", "safe-pgd-1")):
        result = fastadv(command[0], NET, "--data", "images", *command[1:])
        assert result.exit_code == 2
        assert "1.png, which cannot be read" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_folders_that_are_no_classes_shift_no_labels(folder: Path) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX", "ant", "bee"):
        (folder / "images" / name).mkdir(parents=True)
    for name in ("ant", "bee"):
        Image.new("L", (2, 2)).save(folder / "images" / name / "0.png")
    assert [label for _, label in ImageFolder(folder / "images").items] == [0, 1]
    (folder / "images" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"expected images in each folder of .*, got none in cat"):
        ImageFolder(folder / "images")


def test_the_seed_is_that_of_the_model_too(fastadv: Run, folder: Path) -> None:
    (folder / "drawing.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))\n"
    )
    what = (
        "evaluate",
        "drawing.py:net",
        "--data",
        "data.npz",
        "--attacks",
        "safe-pgd-1",
        "--no-progress",
        "--output",
        "run",
    )
    for _ in range(2):
        result = fastadv(*what, "--require", "robust>1")
        assert result.exit_code == 1, result.output


def test_grey_images_keep_one_channel_and_deep_ones_are_refused(folder: Path) -> None:
    (folder / "images" / "ant").mkdir(parents=True)
    Image.new("LA", (2, 2), (51, 7)).save(folder / "images" / "ant" / "0.png")
    Image.new("I;16", (2, 2), 51_000).save(folder / "images" / "ant" / "1.png")
    images = ImageFolder(folder / "images")
    torch.testing.assert_close(images[0][0], torch.full((1, 2, 2), 0.2))
    with pytest.raises(ValueError, match=r"expected an image of 8 bits per channel, got .*1\.png"):
        images[1]


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (np.zeros((3, 2)), np.eye(3), r"expected y in .* to be integers, got float64 of shape \(3, 3\).*argmax"),
        (np.zeros((3, 2)), np.zeros(3), "expected y in .* to be integers, got float64 of shape .3,.: save the classes"),
        (np.zeros((3, 2)), np.zeros(3, bool), "expected y in .* to be integers, got bool"),
        (np.zeros((3, 2)), np.arange(2), r"got shapes \(3, 2\) and \(2,\)"),
        (np.zeros((3, 2)), np.eye(3, dtype=int), r"got shapes \(3, 2\) and \(3, 3\)"),
        (np.zeros((3, 2), np.int16), np.arange(3), "expected x in .* to be floating, or bytes, got int16"),
    ],
)
def test_arrays_that_are_no_images_and_labels_are_refused(x: Any, y: Any, said: str, folder: Path) -> None:
    np.savez(folder / "wrong.npz", x=x, y=y)
    with pytest.raises(ValueError, match=said):
        data_named("wrong.npz", torch.float32, (0.0, 1.0))


def test_evaluate_doubts_a_budget_as_wide_as_the_bounds(fastadv: Run) -> None:
    what = ("evaluate", NET, "--data", "data.npz", "--attacks", "safe-pgd-2", "--no-progress")
    assert "note: eps 8 turns any image within 0,1 into any other" in fastadv(*what, "--eps", "8").stdout
    assert "note: eps 0.03 is less than a tenth of the" in fastadv(*what, "--eps", "0.03", "--bounds", "0,255").stdout
    assert "and bounds are 0,255" in fastadv(*what, "--eps", "8", "--bounds", "0,255").stdout
    assert "and bounds are" not in fastadv(*what).stdout
    for wide in (("--eps", "8/255,1"), ("--eps", "3.5", "--norm", "l2"), ("--eps", "12", "--norm", "l1")):
        assert "note: eps" in fastadv(*what, *wide).stdout
    for fine in (("--eps", "8/255"), ("--eps", "3.4", "--norm", "l2"), ("--eps", "8", "--bounds", "0,255")):
        assert "note: eps" not in fastadv(*what, *fine).stdout


def test_a_note_that_doubts_weights_names_the_option_if_it_was_not_given(fastadv: Run) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(90, 3, 2, 2)
    right = net(x).argmax(1)
    torch.save(net.state_dict(), "w.pt")
    np.savez("guessed.npz", x=x.numpy(), y=torch.where(torch.arange(90) % 3 == 0, right, (right + 1) % 3).numpy())
    np.savez("right.npz", x=x.numpy(), y=right.numpy())
    asks = "note: the command was given no --weights"
    for command in (("compare", NET, "--repeats", "1"), ("evaluate", NET, "--attacks", "safe-pgd-1", "--no-progress")):
        guessed = fastadv(*command, "--data", "guessed.npz").stdout
        assert "were the weights loaded, and do labels belong to them?" in " ".join(guessed.split())
        assert asks in guessed
        assert asks not in fastadv(*command, "--data", "guessed.npz", "--weights", "w.pt").stdout
        assert asks not in fastadv(*command, "--data", "right.npz").stdout


def test_bytes_are_scaled_to_the_bounds(fastadv: Run, folder: Path) -> None:
    """So that eps, which is in their units, means what it says."""
    pixels = np.array([0, 51, 255], np.uint8).repeat(12).reshape(3, 3, 2, 2)
    np.savez("bytes.npz", x=pixels, y=np.arange(3))
    (folder / "images" / "ant").mkdir(parents=True)
    Image.new("RGB", (2, 2), (0, 51, 255)).save(folder / "images" / "ant" / "0.png")
    for text, within in (("0,255", [0, 51, 255]), ("-1,1", [-1, -0.6, 1]), ("-2.1,2.7", [-2.1, -1.14, 2.7])):
        expected = torch.tensor(within, dtype=torch.float32)
        x, _ = data_named("bytes.npz", torch.float32, bounds(text))
        torch.testing.assert_close(x[:, 0, 0, 0], expected)
        torch.testing.assert_close(data_named("images", torch.float32, bounds(text))[0][0][:, 0, 0], expected)
        what = ("evaluate", NET, "--data", "bytes.npz", "--bounds", text, "--attacks", "safe-pgd-2", "--no-progress")
        assert fastadv(*what).exit_code == 0


def test_evaluate_doubts_labels_of_which_none_is_right(fastadv: Run, folder: Path) -> None:
    given = np.load(folder / "data.npz")
    weights = {"1.weight": torch.zeros(3, 12), "1.bias": torch.tensor([0.0, 0.0, 1.0])}
    torch.save(weights, folder / "two.pt")
    for labels, doubted in ((np.ones(12, int), True), (given["y"], False)):
        np.savez(folder / "of_user.npz", x=given["x"], y=labels)
        what = ("--weights", "two.pt", "--data", "of_user.npz", "--attacks", "safe-pgd-2", "--no-progress")
        assert ("note: no sample is right" in fastadv("evaluate", NET, *what).stdout) == doubted


def test_the_demo_trains_compares_and_evaluates(fastadv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv_adapters.cli.app.trained", partial(trained, width=2, epochs=1))
    result = fastadv("demo", "--json", "demo.json")
    assert result.exit_code == 0, result.output
    assert "times as fast" in result.stdout
    assert json.loads(Path("demo.json").read_text(encoding="utf-8"))["samples"] == 128
    assert "on 128 samples" in result.stdout


def test_numbers_are_read_as_people_write_them() -> None:
    assert number("8/255") == 8 / 255
    assert number("0.5") == 0.5
    assert bounds("-1,1") == (-1, 1)
    assert shape("3x32x32") == (3, 32, 32)
    assert requirement("robust>=2/5").limit == 0.4


def test_the_module_is_the_command(folder: Path) -> None:
    command = [sys.executable, "-m", "fastadv_adapters", "report", "nowhere"]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=here)
    assert done.returncode == 2
    assert done.stderr.startswith("fastadv: expected the folder of an evaluation, got nowhere")
    assert len(done.stderr.splitlines()) == 1


def test_compare_takes_the_samples_that_evaluate_takes() -> None:
    x, y = torch.rand(6, 3, 2, 2), torch.arange(6) % 3

    def doubled(items: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = default_collate(items)
        return images / 2, labels

    class Stream(IterableDataset[tuple[torch.Tensor, int]]):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
            yield from zip(x, y.tolist(), strict=True)

    some = Subset(TensorDataset(x, y), [1, 3, 5])
    for data, images in (
        ((x, y), x[:2]),
        (DataLoader(some, batch_size=2, collate_fn=doubled), x[[1, 3]] / 2),
        (DataLoader(some, sampler=[0, 2]), x[[1, 5]]),
        (Stream(), x[:2]),
        (DataLoader(Stream(), batch_size=4), x[:2]),
    ):
        found = first_of(data, 2)
        assert torch.equal(found[0], images)
        assert len(found[1]) == 2
