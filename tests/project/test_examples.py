"""The examples run as they stand."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from digits import Digits, DigitsNet, accuracy, grey_digits, predict, rgb_digits, train, trained_net

ROOT = Path(__file__).parents[2]
PERCENT = re.compile(r"(\d+\.\d)%")


def run_example(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def percentages(text: str) -> list[float]:
    return [float(number) for number in PERCENT.findall(text)]


def test_torchattacks_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    clean, plain, fast, both = percentages(run_example("torchattacks_one_line", capsys))
    assert clean > 90
    assert fast == pytest.approx(plain, abs=2)
    assert both <= fast + 2


def test_foolbox_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    output = run_example("foolbox_one_line", capsys)
    clean, plain, fast, safe = percentages(output)
    assert clean > 90
    assert fast == pytest.approx(plain, abs=2)
    assert safe <= fast + 2
    assert 0 < float(output.split()[-1]) < 8  # the longest distance between two digits of 64 pixels


def test_safe_pgd_example_shows_what_confidence_hides(capsys: pytest.CaptureFixture[str]) -> None:
    pgd, safe, pgd_confident, safe_confident = percentages(run_example("safe_pgd", capsys))
    assert safe <= pgd + 1
    assert pgd_confident > pgd + 20, "the confident network should look robust to PGD"
    assert safe_confident == pytest.approx(safe, abs=5)


def test_adversarial_training_example_makes_robust(capsys: pytest.CaptureFixture[str]) -> None:
    clean, broken, clean_adversarial, robust = percentages(run_example("adversarial_training", capsys))
    assert min(clean, clean_adversarial) > 85
    assert robust > broken + 20


KEPT = ("normal", "adversarial", "digits")


def test_demo_writes_table_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, table = tmp_path / "digits.png", tmp_path / "table.md"
    arguments = ["demo.py", "--quick", "--device", "cpu", "--picture", str(picture), "--table", str(table)]
    arguments += ["--kept", str(tmp_path / "kept")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        run_example("demo", capsys)
    assert ended.value.code == 0
    lines = table.read_text(encoding="utf-8").splitlines()
    assert len({len(line.split("|")) for line in lines[:8]}) == 1, "heading, rule and six rows of as many cells"
    assert [line.split("|")[2].strip() for line in lines[2:5]] == ["torchattacks PGD", "foolbox LinfPGD", "SafePGD"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {f"{n}.safetensors" for n in KEPT}


@pytest.mark.parametrize("missing", ["sklearn.datasets", "rich.progress"])
def test_what_an_example_needs_is_named_in_one_line(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # importing it fails
    with pytest.raises(SystemExit, match=rf"expected {missing} to be installed, got none: pip install -e '\.\[demo\]'"):
        runpy.run_path(str(ROOT / "examples" / "digits.py"))


DIGITS = [(grey_digits(test_size=100), (1, 8, 8)), (rgb_digits(test_size=100), (3, 32, 32))]


@pytest.mark.parametrize(("data", "shape"), DIGITS, ids=["grey", "rgb"])
def test_digits_are_split_and_in_range(data: Digits, shape: tuple[int, ...]) -> None:
    assert data.train_images.shape == (1697, *shape)
    assert data.test_images.shape == (100, *shape)
    assert data.test_images.dtype == torch.float32
    assert 0 <= data.train_images.min() < 0.1 < 0.9 < data.train_images.max() <= 1
    assert set(data.test_labels.tolist()) == set(range(10))


def test_training_is_the_same_for_the_same_seed() -> None:
    data = grey_digits()
    nets = [trained_net(data, width=4, epochs=1) for _ in range(2)]
    for first, second in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(first, second)


def test_training_attacks_each_batch() -> None:
    data = grey_digits()
    net = DigitsNet(width=4)
    seen: list[int] = []

    def attack(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(len(y))
        return x

    steps = train(net, data.train_images[:40], data.train_labels[:40], attack=attack, epochs=2, batch_size=16)
    assert seen == [16, 16, 8] * 2
    assert steps == 6
    assert not net.training


def test_accuracy_counts_what_predict_gives() -> None:
    data = grey_digits()
    net = DigitsNet(width=4).eval()
    assert accuracy(net, data.test_images, predict(net, data.test_images)) == 1
