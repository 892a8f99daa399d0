"""``compare``: what it finds, what it recommends, and that it leaves everything as it was."""

import html
import io
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foolbox
import matplotlib
import numpy as np
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from digits import grey_digits, trained_net
from fastadv_adapters import Comparison, FastAttackModel, SafePGD, compare
from fastadv_adapters.comparison import Row
from fastadv_adapters.comparison.fidelity import Pass, agreement
from fastadv_adapters.comparison.row import Effect
from fastadv_adapters.comparison.showing import telling

DATA = grey_digits(test_size=16)
X, Y = DATA.test_images, DATA.test_labels


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return trained_net(DATA, width=8, epochs=3)


@pytest.fixture(scope="module")
def found(net: nn.Module) -> Comparison:
    return compare(net, X, Y, eps=0.15, repeats=2)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def signed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One step of the attack, the simplest there is."""
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(leaf), y)
    return (x + 0.2 * torch.autograd.grad(loss, leaf)[0].sign()).clamp(0, 1)


def slower_on(kind: str) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """An attack that takes its time on one kind of model."""

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(model, FastAttackModel) == (kind == "fast"):
            time.sleep(0.03)
        return signed(model, x, y)

    return attack


def test_it_tells_how_fast_how_faithful_and_how_strong(found: Comparison, net: nn.Module) -> None:
    plain, default = found.row("plain"), found.row("default")
    assert found.reference == "float64"
    assert plain.ratios == [1.0] * len(plain.ratios)
    assert len(default.seconds) == len(default.ratios) >= 2
    assert len(default.cosines) == len(X)
    assert plain.cosine > 0.9999
    assert default.cosine > 0.99
    assert 0.9 < (default.signs or 0) <= 1
    assert (default.zero, default.spoilt, default.lost) == (0, 0, 0)
    assert 0 < (default.kept_bytes or 0) < (plain.kept_bytes or 0)
    with torch.no_grad():
        clean = (net(X).argmax(1) == Y).double().mean().item()
    assert 0 <= (plain.robust_accuracy or 0) < clean
    assert found.faithful
    assert "faithful" in found.verdict


def test_it_can_be_printed_shown_in_a_notebook_written_and_drawn(found: Comparison, tmp_path: Path) -> None:
    with (tmp_path / "table.txt").open("w", encoding="utf-8") as file:
        found.print(file)
    text = " ".join((tmp_path / "table.txt").read_text(encoding="utf-8").split())
    assert found.verdict in text
    assert all(head in text for head in ("times as fast", "robust accuracy", "cosine"))
    assert "<table>" in found._repr_html_()
    found.to_json(tmp_path / "found.json")
    record = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert record["verdict"] == found.verdict
    assert [row["name"] for row in record["rows"]] == [row.name for row in found.rows]
    assert record["rows"][1]["robust_accuracy"] == found.row("default").robust_accuracy
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.png", "table.txt"]


def test_a_file_of_before_stays_if_writing_fails(
    found: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "found.json"
    path.write_text("of before", encoding="utf-8")

    def full(self: Path, *_: Any, **__: Any) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            found.to_json(path)
    assert path.read_text(encoding="utf-8") == "of before"
    assert list(tmp_path.iterdir()) == [path]


def test_bounds_without_an_end_can_be_written(tmp_path: Path) -> None:
    found = compare(linear(), X, Y, eps=0.1, bounds=(-math.inf, math.inf), repeats=1)
    found.to_json(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["setting"]["bounds"] == [None, None]


def test_what_is_slower_is_never_recommended() -> None:
    found = compare(linear(), X, Y, attack=slower_on("fast"), repeats=2)
    assert found.recommended is None
    assert found.speedup == 1
    assert found.faithful
    assert found.verdict.startswith("Stay with the plain model: the fast one is faithful and slower (")


def test_what_is_recommended_beside_the_default_options_is_named() -> None:
    rows = [Row("plain", ratios=[1.0, 1.0]), Row("default", {}, ratios=[0.8, 0.9]), Row("float32", ratios=[1.5, 1.7])]
    rows[2].options = {"dtype": torch.float32}
    found = Comparison("PGD-10", 4, rows, "float32", "float64", {"eps": 0.1, "norm": "linf"}, {}, {})
    assert found.verdict == (
        "The fast model is faster (1.60 times as fast, 1.55 to 1.65) and faithful, with dtype=torch.float32; with the "
        "default options it is faithful and slower (0.85 times as fast, 0.83 to 0.88)."
    )
    assert found.verdict in repr(found)
    assert found.record()["recommended"] == {"dtype": "torch.float32"}


def test_on_a_terminal_it_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with telling(True) as say:
        say("timing 3 ways in turn")
        say("timing default once more")
    assert "\x1b[" in terminal.getvalue()


def test_what_is_faster_and_faithful_is_recommended() -> None:
    model = linear()
    found = compare(model, X, Y, attack=slower_on("plain"), repeats=2, options={"dtype": torch.float32})
    assert found.recommended == {"dtype": torch.float32}
    assert FastAttackModel(model, **found.recommended).dtype == torch.float32
    assert found.speedup > 2
    assert [row.name for row in found.rows] == ["plain", "default"]
    assert len(found.row("default").ratios) == 2 + 4, "it is measured once more before it is recommended"


def test_an_attack_that_is_weaker_on_fast_models_is_not_faithful() -> None:
    def weak(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x if isinstance(model, FastAttackModel) else slower_on("plain")(model, x, y)

    found = compare(linear(), X, attack=weak, repeats=1)
    row = found.row("default")
    assert not found.faithful
    assert found.recommended is None
    assert row.robust_accuracy == 1
    assert row.differ > 1
    assert "images more stand" in row.faults[0]
    assert "NOT faithful" in found.verdict


def test_an_attack_that_needs_larger_perturbations_on_fast_models_is_not_faithful() -> None:
    def far(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x + (1.5 if isinstance(model, FastAttackModel) else 1.0) * (signed(model, x, y) - x)

    found = compare(linear(), X, attack=far, repeats=1)
    assert "farther away" in found.row("default").faults[0]


def test_gradients_that_are_zero_or_not_finite_are_counted_and_not_faithful() -> None:
    exact = Pass(torch.tensor([[2.0, 1.0]] * 4), torch.ones(4, 3).double())
    plain = agreement(Pass(exact.logits, torch.tensor([[1.0] * 3] * 3 + [[0.0] * 3]).double()), exact)
    gradients = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), -1.0], [0.0, 0.0, 0.0]]).double()
    fast = agreement(Pass(torch.tensor([[1.0, 2.0], *[[2.0, 1.0]] * 3]), gradients), exact)
    assert fast.signs.tolist() == pytest.approx([1, 0, 1 / 3, 0])
    row, plain_row, effect = Row("default", {}), Row("plain"), Effect(torch.ones(4).bool(), torch.zeros(4))
    plain_row.put(plain, plain)
    row.put(fast, plain)
    assert (row.zero, row.spoilt, row.lost, row.classes_differ) == (2, 1, 2, 1), "the last one is lost in plain too"
    row.judge(effect, effect, plain_row)
    assert "2 of 4 gradients are zero or not finite" in row.faults[0]
    assert "cosine" in row.faults[1]
    assert row.record()["cosines"][2] is None


def test_a_model_that_cannot_be_made_fast_is_told_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    make = FastAttackModel.__init__

    def refuse(self: FastAttackModel, model: nn.Module, **options: Any) -> None:
        if isinstance(model, nn.Sequential):
            raise ValueError("expected another model")
        make(self, model, **options)

    monkeypatch.setattr(FastAttackModel, "__init__", refuse)
    found = compare(linear(), X, repeats=1)
    assert found.recommended is None
    assert found.row("default").failure == "ValueError: expected another model"
    assert "not able to run" in found.verdict
    assert "failed: ValueError" in found._repr_html_()


@pytest.mark.parametrize("library", ["torchattacks", "foolbox"])
def test_attacks_of_the_libraries_are_copied_and_accelerated(library: str) -> None:
    model = linear()
    attack: Any = torchattacks.PGD(model, eps=0.1, steps=2)
    if library == "foolbox":
        attack = foolbox.attacks.LinfPGD(steps=2)
    before = dict(vars(attack))
    found = compare(model, X, Y, attack=attack, eps=0.1, repeats=1)
    assert found.attack.startswith(library)
    assert found.row("default").distance == pytest.approx(0.1, abs=1e-5)
    assert dict(vars(attack)) == before


def test_the_model_and_the_random_generators_are_left_as_they_were() -> None:
    model = linear().train()
    state = torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compare(model, X, Y, repeats=1)
    assert all(part.training for part in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(bool((tensor == weights[name]).all()) for name, tensor in model.state_dict().items())
    assert bool((torch.get_rng_state() == state).all())


def test_notes_stand_beside_the_verdict_and_in_the_json() -> None:
    """What is seldom meant is allowed and told; of attacks that say nothing of their budget nothing is said of eps."""
    assert compare(linear(), X, repeats=1).notes == []
    odd = compare(nn.Sequential(linear(), nn.Softmax(1)), X, (linear()(X).argmax(1) + 1) % 10, eps=8, repeats=1)
    wide, labels, probabilities = odd.notes
    assert wide.startswith("eps 8 turns any image within 0,1 into any other")
    assert labels.startswith("no sample is right even without an attack")
    assert probabilities.startswith("the model seems to return probabilities")
    assert odd.record()["notes"] == odd.notes
    printed = io.StringIO()
    odd.print(printed)
    assert all(note in " ".join(printed.getvalue().split()) for note in odd.notes)
    assert all(html.escape(f"note: {note}") in odd._repr_html_() for note in odd.notes)
    assert compare(linear(), X, attack=signed, repeats=1).notes == []


def test_an_accuracy_that_guessing_has_is_noted() -> None:
    model, x = linear(), torch.rand(64, 1, 8, 8)
    with torch.no_grad():
        right = model(x).argmax(1)
    guessed = torch.where(torch.arange(64) % 10 == 0, right, (right + 1) % 10)
    (note,) = compare(model, x, guessed, repeats=1).notes
    assert note.startswith("clean accuracy 10.9 % is no better than chance for 10 classes: were the weights loaded")
    assert compare(model, x, right, repeats=1).notes == []


def test_a_model_that_draws_random_numbers_is_noted() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x + 0.1 * torch.randn_like(x)).flatten(1))

    assert [note[:31] for note in compare(Noisy(64, 10), X, repeats=1).notes] == ["the model draws random numbers:"]


class Pair(nn.Linear):
    """Returns more than logits."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.flatten(1)), x


@pytest.mark.parametrize(
    ("changed", "kind", "text"),
    [
        ({"model": len}, TypeError, r"expected a torch.nn.Module"),
        ({"x": X * 2}, ValueError, r"expected x within bounds"),
        ({"x": X[:0], "y": None}, ValueError, r"expected at least one sample"),
        ({"x": X / torch.zeros(1)}, ValueError, r"expected x to be finite"),
        ({"y": Y + 10}, ValueError, r"expected labels below the number of classes, 10"),
        ({"y": Y - 10}, ValueError, r"expected labels of at least 0"),
        ({"x": (255 * X).byte()}, TypeError, r"expected x to be floating, .* x.float\(\) / 255"),
        (
            {"x": X.double()},
            ValueError,
            r"expected the model to take inputs of shape \(16, 1, 8, 8\) and torch.float64",
        ),
        ({"x": X.to("meta")}, ValueError, r"expected x on cpu, where the model is, got meta"),
        ({"y": nn.functional.one_hot(Y, 10).float()}, ValueError, r"not one-hot rows"),
        ({"model": Pair(64, 10)}, ValueError, r"expected the model to return logits of shape .*, got tuple: wrap"),
        (
            {"model": nn.Sequential(linear(), nn.Linear(10, 1)), "y": None},
            ValueError,
            r"C at least 2, got shape \(16, 1\)",
        ),
        ({"y": Y.float()}, TypeError, r"expected y to hold integer class labels"),
        ({"y": Y[:3]}, ValueError, r"expected y of shape \(16,\)"),
        ({"eps": -1}, ValueError, r"expected eps to be finite and at least 0"),
        ({"norm": "l3"}, ValueError, r"expected norm to be one of"),
        ({"bounds": (1, 0)}, ValueError, r"expected bounds \(lower, upper\)"),
        ({"progress": "no"}, ValueError, r"expected progress to be True or False, got 'no'"),
        ({"attack": "PGD"}, TypeError, r"expected attack to be of torchattacks or foolbox, or a callable"),
        ({"attack": SafePGD(linear(), eps=0.1)}, TypeError, r"that takes any model, got a SafePGD, which holds one"),
        (
            {"attack": torchattacks.FGSM(linear())},
            ValueError,
            r"expected an attack on the plain model that",
        ),
        ({"attack": lambda model, x, y: x[:1]}, ValueError, r"expected the attack to return a tensor of shape"),
        ({"model": nn.Sequential(nn.Conv2d(1, 1, 1))}, ValueError, r"expected the model to return logits"),
        (
            {"options": {"dtyp": torch.float32}},
            TypeError,
            "expected options of FastAttackModel, got dtyp: check the name",
        ),
        ({"options": ["dtype"]}, TypeError, "expected options as a dictionary, got list"),
        ({"options": {"dtype": "float16"}}, ValueError, r"expected dtype to be .auto. or one of"),
    ],
)
def test_what_cannot_be_compared_is_an_error(changed: dict[str, Any], kind: type[Exception], text: str) -> None:
    given: dict[str, Any] = {"model": linear(), "x": X, "y": Y, "repeats": 1, **changed}
    with pytest.raises(kind, match=text):
        compare(given.pop("model"), given.pop("x"), given.pop("y"), **given)


def test_samples_are_counted_in_whole_numbers_in_the_picture(tmp_path: Path) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        compare(linear(), X[:1], repeats=1).plot(tmp_path / "one.svg")
    picture = (tmp_path / "one.svg").read_text(encoding="utf-8")
    histogram = picture[picture.index('id="axes_2"') :]
    ticks = re.findall(r"<text[^>]*>([\d.]+)</text>", histogram[histogram.index('id="matplotlib.axis_4"') :])
    assert ticks
    assert [tick for tick in ticks if "." in tick] == []


class Counting(nn.Module):
    """Keeps count of its passes."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = linear()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("edges", torch.eye(3).to_sparse())
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.passes += 1
        logits: Tensor = self.layers(x)
        return logits


def rough(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """An attack that uses whatever it finds."""
    model.train()
    x.requires_grad_()
    nn.functional.cross_entropy(model(x), y).backward()
    assert x.grad is not None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return x.detach().add_(0.2 * x.grad.sign()).clamp_(0, 1)


def test_an_attack_that_writes_into_everything_leaves_model_and_data_as_they_were() -> None:
    model, x, y = Counting().eval(), X.clone(), Y.clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = [p.grad for p in model.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastAttackModel, "train", lambda self, mode=True: self)
        found = compare(model, x, y, attack=rough, repeats=1)
    assert found.row("plain").robust_accuracy == found.row("default").robust_accuracy
    assert torch.equal(x, X)
    assert not x.requires_grad
    assert all(p.grad is g and p.requires_grad for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(bool((g == 1).all()) for g in gradients if g is not None)
    assert not any(part.training for part in model.modules())
    assert model.count == 0
    assert model.passes == 0


def test_numbers_that_are_no_image_are_no_success() -> None:
    def broken(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x * torch.nan if isinstance(model, FastAttackModel) else signed(model, x, y)

    found = compare(linear(), X, Y, attack=broken, repeats=1)
    assert found.row("default").robust_accuracy == 1
    assert not found.faithful


def test_tensors_of_inference_mode_are_taken() -> None:
    model = linear()
    with torch.inference_mode():
        found = compare(model, X.clone(), Y.clone(), eps=0.15, repeats=1)
    assert found.row("default").failure is None


def test_attacks_that_draw_from_any_generator_draw_the_same_on_every_model() -> None:
    drawn: list[tuple[float, float, float]] = []

    def noting(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))  # noqa: NPY002
        return x

    compare(linear(), X, Y, attack=noting, repeats=1)
    assert len(drawn) > 3
    assert len(set(drawn)) == len({first for first, _, _ in drawn}) < len(drawn), "each as often as PyTorch's"


def test_a_class_that_is_left_out_is_no_error_of_logits() -> None:
    logits, gradient = torch.tensor([[1.0, 2.0, -torch.inf]] * 3), torch.ones(3, 4)
    off = logits.clone()
    off[1, 0], off[2, 2] = 1.5, 0.0
    found = agreement(Pass(off, gradient), Pass(logits, gradient))
    assert found.logits_error.tolist() == [0.0, 0.25, torch.inf]
    assert found.spoilt.tolist() == [False, False, False]
    spoilt = torch.tensor([[1.0, torch.nan, -torch.inf]] * 3)
    assert bool(agreement(Pass(spoilt, gradient), Pass(logits, gradient)).spoilt.all())


class OnlyFloat32(nn.Module):
    """Refuses float64 by an assertion."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        logits: Tensor = self.inner(x)
        return logits


def test_a_model_that_refuses_float64_is_compared_in_its_own_precision(net: nn.Module) -> None:
    found = compare(OnlyFloat32(net).eval(), X, Y, eps=0.15, repeats=1)
    assert found.reference == "float32"
    assert found.faithful


def test_a_way_that_is_not_faithful_has_its_speed_all_the_same() -> None:
    rows = [Row("plain", ratios=[1.0] * 3), Row("default", ratios=[2.9, 3.0, 3.1], faults=["too few fall"])]
    found = Comparison("PGD", 8, rows, None, "float64", {}, {}, {}, [])
    assert "NOT faithful (too few fall) and faster (3.00 times as fast" in found.verdict
