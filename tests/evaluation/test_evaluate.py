"""What ``evaluate`` finds: it depends neither on batches nor on order, and the plain model has the last word."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastadv_adapters import FastAttackModel, FastAttackOptions, FastAttackWarning, Report, SafePGD, evaluate
from fastadv_adapters.evaluation import Row
from fastadv_adapters.modules import Decisions
from tests.evaluation.runs import EPS, FLOAT32, data, evaluated, net, verdicts
from tests.networks.test_losing import Angles, bright_from
from tests.support.tools import attackable_net, fingerprint


@pytest.fixture(scope="module")
def whole() -> Report:
    return evaluated()


class Broken(Dataset[tuple[Tensor, int]]):
    """The fifth image cannot be read."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 5:
            raise OSError("truncated file")
        return torch.rand(3, 8, 8), 0


class Noisy(nn.Module):
    """Draws random numbers, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = attackable_net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x + 0.01 * torch.randn_like(x))
        return logits


class Pair(nn.Linear):
    """Returns more than logits."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.flatten(1)), x


def shuffled(x: Tensor, y: Tensor) -> Any:
    return DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True, drop_last=True)


def batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(x.split(9), y.split(9), strict=True)


def one_by_one(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, int]]:
    yield from zip(x, y.tolist(), strict=True)


def test_some_are_wrong_some_fall_and_some_stand(whole: Report) -> None:
    x, y = data()
    assert [row.index for row in whole.samples] == list(range(len(x)))
    assert whole.clean_accuracy == pytest.approx(1 - sum(row.broken_by == "clean" for row in whole.samples) / len(x))
    assert 0 < whole.robust_accuracy < whole.clean_accuracy
    assert list(whole.by_attack.values()) == sorted(whole.by_attack.values(), reverse=True)
    assert whole.by_attack["safe-pgd-targeted-2"] == whole.robust_accuracy
    adversarials = whole.adversarials()
    for row in whole.samples:
        assert row.label == y[row.index]
        if row.linf is not None:
            found = adversarials[row.index]
            assert row.linf <= EPS
            assert row.linf == (found.double() - x[row.index].double()).abs().max()
            assert net()(found[None]).argmax() == row.prediction != row.label
    assert all(row.forward == 0 for row in whole.samples if row.broken_by == "clean")


@pytest.mark.parametrize("size", [1, 7, 128])
def test_the_size_of_batches_changes_no_verdict(whole: Report, size: int) -> None:
    assert verdicts(evaluated(batch_size=size)) == verdicts(whole)


@pytest.mark.parametrize("give", [shuffled, TensorDataset, batches, one_by_one])
def test_neither_does_the_way_in_which_samples_come(whole: Report, give: Callable[..., Any]) -> None:
    assert verdicts(evaluated(give(*data()))) == verdicts(whole)


def test_fewer_passes_than_in_fixed_batches() -> None:
    x, y = data(64)
    fast = FastAttackModel(net(), **FLOAT32)
    report = evaluated((x, y), [SafePGD(fast, eps=8 * EPS, steps=50)], model=fast, eps=8 * EPS)
    assert report.robust_accuracy == 0
    passes = sum((row.forward or 0) + (row.backward or 0) for row in report.samples)
    assert passes < 0.15 * 100 * len(x)


def test_a_limit_takes_the_first(whole: Report) -> None:
    assert verdicts(evaluated(limit=9)) == verdicts(whole)[:9]


def test_the_model_is_as_it_was() -> None:
    model = Noisy().train()
    given = data(8)
    before = fingerprint(model)
    evaluate(model, given, "safe-pgd-2", eps=EPS, progress=False, options=FLOAT32)
    assert fingerprint(model) == before


def test_a_larger_budget_begins_with_what_a_smaller_one_broke() -> None:
    budgets = [EPS / 2, EPS, 2 * EPS]
    curve = evaluated(eps=budgets)
    assert list(curve.curve) == budgets
    assert list(curve.curve.values()) == sorted(curve.curve.values(), reverse=True)
    smallest = {row.index for row in evaluated(eps=budgets[0]).samples if row.broken_by is not None}
    assert {row.index for row in curve.samples if row.eps is not None and row.eps <= budgets[0]} == smallest
    assert curve.robust_accuracy == curve.curve[budgets[-1]]


def far(x: Tensor, y: Tensor) -> Tensor:
    return (x + 0.5).clamp(0, 1)


def outside(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    sign: Tensor = model(x).sum().sign()
    return x + 2 * EPS * sign


@pytest.mark.parametrize("attack", [far, outside])
def test_what_lies_outside_of_the_budget_does_not_count(attack: Any) -> None:
    report = evaluated(attacks=attack)
    assert report.robust_accuracy == report.clean_accuracy
    assert report.outside == {attack.__name__: round(report.clean_accuracy * len(report.samples))}
    assert report.denied == 0


def test_the_plain_model_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = FastAttackModel(net(), **FLOAT32)

    def claimed(x: Tensor, y: Tensor) -> Tensor:
        return x + EPS / 100

    original = FastAttackModel.forward

    def lying(self: FastAttackModel, x: Tensor) -> Any:
        return -original(self, x) if self._decisions == "fast" else original(self, x)

    monkeypatch.setattr(FastAttackModel, "forward", lying)
    report = evaluated(attacks=claimed, model=fast)
    assert report.denied == round(report.clean_accuracy * len(report.samples))
    assert f"{report.denied} images that an attack called adversarial are right by the plain model" in str(report)
    one = replace(report, samples=tuple(row for row in report.samples if row.denied)[:1])
    assert "note: 1 image that an attack called adversarial is right by the plain model" in str(one)
    assert report.robust_accuracy > 0


def test_a_model_that_draws_random_numbers_is_noticed_and_asked_more_often() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = evaluate(Noisy(), data(16), "safe-pgd-4", eps=EPS, progress=False, options=FLOAT32)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert verdicts(one) == verdicts(
        evaluate(Noisy(), data(16), "safe-pgd-4", eps=EPS, progress=False, options=FLOAT32)
    )
    assert one.random
    assert "random numbers" in str(one)
    broken = [row for row in one.samples if row.broken_by not in (None, "clean")]
    assert broken
    assert all((row.backward or 0) >= 10 for row in one.samples if row.broken_by is None), "gradients are averaged"


def test_attacks_of_all_libraries_one_after_the_other() -> None:
    plain = net()
    first = torchattacks.FGSM(plain, eps=EPS)
    attacks = [first, foolbox.attacks.LinfPGD(steps=3), outside, "safe-pgd-4", "safe-pgd-4"]
    report = evaluated(attacks=attacks)
    names = ["FGSM", "LinfProjectedGradientDescentAttack", "outside", "safe-pgd-4", "safe-pgd-4 (2)"]
    assert list(report.by_attack) == ["clean", *names]
    assert report.by_attack["FGSM"] < report.clean_accuracy
    assert first.model is plain, "the attack that was given is copied"
    standing = [row for row in report.samples if row.broken_by is None]
    assert standing
    assert all((row.backward or 0) >= 1 + 3 + 0 + 8 for row in standing)
    assert {"torchattacks", "foolbox"} <= set(report.header["versions"])


def ascending(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    return (x + EPS * gradient.sign()).clamp(0, 1).detach()


@pytest.mark.parametrize(
    "attack",
    [
        lambda: torchattacks.FGSM(net(), eps=EPS),
        lambda: torchattacks.EADL1(net(), max_iterations=10, binary_search_steps=1),
        lambda: foolbox.attacks.LinfPGD(steps=1),
        lambda: "apgd-ce",
        lambda: ascending,
    ],
    ids=["torchattacks", "EAD", "foolbox", "reference", "callable"],
)
@pytest.mark.parametrize(("decisions", "dtype"), [("exact", torch.float32), ("fast", torch.float64)])
def test_decisions_and_logits_that_are_asked_for_reach_every_attack(
    attack: Callable[[], Any], decisions: Decisions, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    original = FastAttackModel.forward

    def watched(self: FastAttackModel, x: Tensor) -> Any:
        if x.requires_grad:
            seen.add((self._decisions, self._logits_dtype, self._full_precision))
        return original(self, x)

    monkeypatch.setattr(FastAttackModel, "forward", watched)
    options: FastAttackOptions = {"dtype": torch.float32, "decisions": decisions, "logits_dtype": dtype}
    evaluate(net(), data(8), [attack()], eps=EPS, progress=False, options=options)
    assert seen == {(decisions, dtype, False)}


def test_an_attack_may_be_called_clean() -> None:
    def clean(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return ascending(model, x, y)

    report, other = evaluated(attacks=clean), evaluated(attacks=ascending)
    assert list(report.by_attack) == ["clean", "clean (2)"]
    assert list(report.by_attack.values()) == list(other.by_attack.values())
    assert report.clean_accuracy > report.robust_accuracy


def test_passes_on_a_model_of_its_own_are_not_counted() -> None:
    transferred = torchattacks.FGSM(attackable_net(), eps=EPS)
    report = evaluated(attacks=transferred)
    assert {row.forward for row in report.samples if row.broken_by is None} == {None}
    assert any("was made of another model, a Sequential: it attacks that" in note for note in report.notes)
    for model in (net(), FastAttackModel(net(), **FLOAT32), nn.DataParallel(net()).eval()):
        own = evaluated(attacks=torchattacks.FGSM(model, eps=EPS))
        assert not any("made of another model" in note for note in own.notes)
    assert {row.forward for row in evaluated(attacks=far).samples if row.broken_by is None} == {None}


def test_the_copy_that_lgv_trains_is_no_other_model() -> None:
    training = DataLoader(TensorDataset(*data(8)), batch_size=8)
    attack = torchattacks.LGV(net(), training, eps=EPS, steps=2, epochs=1, nb_models_epoch=1, verbose=False)
    assert not any("made of another model" in note for note in evaluated(data(8), attacks=attack).notes)


def test_the_reference_breaks_what_it_breaks_by_itself() -> None:
    from pyautoattack import AutoAttack

    x, y = data(16)
    report = evaluated((x, y), "apgd-ce", batch_size=16)
    adversary = AutoAttack(net(), attacks=["apgd-ce"], version="custom", eps=EPS, seed=0)
    adversary.apgd.n_restarts = 1
    theirs, _ = adversary.run_standard_evaluation(x, y, batch_size=16)
    assert report.robust_accuracy == pytest.approx((net()(theirs).argmax(1) == y).float().mean().item(), abs=1 / 16)
    assert "pyautoattack" in report.header["versions"]


def test_each_row_is_told_once() -> None:
    told: list[Row] = []
    report = evaluated(callback=told.append)
    assert sorted(told, key=lambda row: row.index) == list(report.samples)


def test_notes_are_part_of_a_report_and_of_its_json(tmp_path: Path) -> None:
    """What is seldom meant is allowed, and stands beside the number: also on the disk."""
    assert evaluated(data(8)).notes == []
    x, y = data(8)
    twice = torch.cat([x, x[:3]]), torch.cat([y, y[:3]])
    odd = evaluated(twice, model=nn.Sequential(net(), nn.Softmax(1)), eps=[EPS, 8], output=tmp_path / "run", limit=99)
    wide, probabilities, copies = odd.notes[:3]
    assert wide.startswith("eps 8 turns any image within 0,1 into any other")
    assert probabilities.startswith("the model seems to return probabilities")
    assert copies.startswith("3 samples have the image of another")
    assert Report.load(tmp_path / "run").notes == odd.notes == odd.as_dict()["notes"]
    assert all(f"\n  note: {note}" in str(odd) for note in odd.notes)
    wrong = evaluated((x, (net()(x).argmax(1) + 1) % 10))
    assert wrong.notes[0].startswith("no sample is right even without an attack")


def nan(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.clone().fill_(torch.nan), y


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "label too large": (
        {"given": (data(8)[0], torch.full((8,), 10))},
        "expected labels below the number of classes, 10, got 10 in samples .* of data: count labels from 0",
    ),
    "label below 0": ({"given": (data(8)[0], torch.full((8,), -1))}, "expected labels of at least 0, got -1"),
    "values": ({"given": (data(8)[0] * 255, data(8)[1])}, r"expected x within bounds \(0, 1\), got values from"),
    "NaN": ({"given": nan(*data(8))}, "expected x to be finite"),
    "lengths": ({"given": (data(8)[0], data(7)[1])}, "expected as many labels as images in data"),
    "a broken image": ({"given": Broken()}, "expected samples 0 to 7 of data to be readable.* truncated file"),
    "no samples": ({"given": []}, "expected at least one sample in data, got none"),
    "triples": ({"given": [(1, 2, 3)]}, "expected data to give pairs"),
    "starts that are given by classes": ({"attacks": "safe-pgd-targeted-9x2"}, "to name a preset .*, got 'safe-pgd-t"),
    "an unknown attack": ({"attacks": "pdg"}, "expected attacks to name a preset .*, got 'pdg'"),
    "no attack": ({"attacks": []}, "expected at least one attack"),
    "another budget": (
        {"attacks": SafePGD(net(), eps=1.0)},
        "expected SafePGD with eps, norm and bounds of the evaluation",
    ),
    "targets": ({"attacks": SafePGD(net(), eps=EPS, targeted=True)}, "expected an untargeted SafePGD"),
    "no classes": (
        {"attacks": SafePGD(net(), eps=EPS, loss=lambda outputs, y: outputs.sum(1), classes=False)},
        "expected SafePGD of images and class labels in attacks, got one with classes=False: pass a callable",
    ),
    "no budget": ({"eps": []}, "expected at least one budget"),
    "batch size": ({"batch_size": 0}, "expected batch_size to be at least 1"),
    "resume": ({"resume": "no"}, "expected resume to be True or False, got 'no'"),
    "progress": ({"progress": "no"}, "expected progress to be True or False, got 'no'"),
    "options twice": ({"options": FLOAT32}, "expected no options for a model that is fast already"),
    "one-hot rows": (
        {"given": (data(8)[0], nn.functional.one_hot(data(8)[1], 10).float())},
        r"expected y of shape \(8,\).* not one-hot rows",
    ),
    "bytes": (
        {"given": ((data(8)[0] * 255).byte(), data(8)[1])},
        r"expected x to be floating, got torch.uint8. .* x.float\(\) / 255",
    ),
    "images of another shape": (
        {"given": (data(8)[0][:, :2], data(8)[1])},
        r"expected the model to take inputs of shape \(2, 2, 8, 8\)",
    ),
    "a tuple": ({"model": Pair(3 * 8 * 8, 10)}, "expected the model to return logits of .*, got tuple"),
    "no logits": ({"model": nn.Sequential(net(), nn.Unflatten(1, (5, 2)))}, "expected the model to return logits"),
    "the reference": ({"attacks": "square", "bounds": (-1, 1)}, r"expected bounds \(0, 1\) for square"),
}


def test_an_accuracy_that_guessing_has_is_noted(tmp_path: Path) -> None:
    x, y = data(64)
    guessed = torch.where(torch.arange(64) % 10 == 1, y, (y + 1) % 10)
    quick = {"attacks": "safe-pgd-1", "output": tmp_path}
    report = evaluated((x, guessed), **quick)
    (note,) = (note for note in report.notes if "chance" in note)
    assert note.startswith(
        f"clean accuracy {100 * report.clean_accuracy:.1f} % is no better than chance for 10 classes"
    )
    assert Report.load(tmp_path).notes == report.notes
    unfinished = replace(report, samples=report.samples[:-1])
    assert not any("chance" in note for note in unfinished.notes), "what is wrong is finished before what stands"
    old = replace(report, header={**report.header, "model": {"random": False}})
    assert not any("chance" in note for note in old.notes), "who does not say how many classes there are"
    assert not any("chance" in note for note in evaluated((x, y), "safe-pgd-1").notes)


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_clear_error_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    settings, text = WRONG[name]
    with pytest.raises(TypeError if name == "bytes" else ValueError, match=f"(?s){text}"):
        evaluated(**settings, output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


X, Y = data(8)
MISREAD: dict[str, tuple[Any, str]] = {
    "arrays": (
        (X.numpy(), Y.numpy()),
        r"as a pair of tensors \(x, y\), got ndarray and ndarray: pass \(torch\.from_numpy",
    ),
    "a list of labels": ([X, Y.tolist()], r"as a pair of tensors .*, got Tensor and list: pass .*torch\.tensor of"),
    "lists": ((X.tolist(), Y.tolist()), r"as a pair of tensors .*, got list and list: pass .*torch\.tensor of"),
    "lists of two": ([X[:2].tolist(), (1, 2)], r"as a pair of tensors .*, got list and tuple: pass"),
    "images alone": (X, r"images and labels, got one Tensor: pass them as one pair, evaluate\(model, \(x, y\).*\.\)$"),
    "an array alone": (X.numpy(), r"images and labels, got one ndarray: .* pair.*; torch\.from_numpy makes"),
    "a name": ("test.npz", r"as tensors, .*, got the str 'test\.npz': load it.* fastadv evaluate --data"),
    "a path": (Path("test.npz"), r"as tensors, .*, got the \w*Path 'test\.npz': load it"),
    "a dictionary": ({"x": X, "y": Y}, r"as a pair \(x, y\), got a dict with 'x', 'y': take"),
}


@pytest.mark.parametrize("name", MISREAD)
def test_what_would_be_misread_as_an_iterable_is_told_what_to_do(name: str, tmp_path: Path) -> None:
    given, text = MISREAD[name]
    with pytest.raises(TypeError, match=f"expected data (with )?{text}"):
        evaluated(given, output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "settings"), [((X, Y, "quick"), {}), ((X, Y), {"attacks": "quick"})], ids=["three", "two"]
)
def test_images_and_labels_are_one_argument(arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
    with pytest.raises(
        TypeError, match=r"got a model and Tensor, Tensor.*: .* pair, evaluate\(model, \(x, y\), attacks"
    ):
        evaluate(net(), *arguments, eps=EPS, **settings)


@pytest.mark.parametrize(
    "settings", [{"given": 5}, {"attacks": 5}, {"eps": "8/255"}, {"given": (data(8)[0], data(8)[1].float())}]
)
def test_another_kind_of_argument_is_a_type_error(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"expected .*, got "):
        evaluated(**settings, output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_batch_in_which_an_audit_failed_is_attacked_again() -> None:
    """An attack may remember logits that it saw before that, as APGD does."""
    calls: list[tuple[int, torch.dtype]] = []

    def attack(model: FastAttackModel, x: Tensor, y: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
        calls.append((len(x), model.dtype))
        return x + EPS * gradient.sign()

    model, (x, _) = Angles(when_bright=0.3).eval(), bright_from(4)
    with torch.no_grad():
        y = model(x).argmax(1)
    with pytest.warns(FastAttackWarning, match="audit-failed"):
        evaluated((x, y), attack, model=FastAttackModel(model, dtype=torch.bfloat16))
    assert calls == [(8, torch.float32)] * 3  # what ran in bfloat16 first had float32 at its end


@pytest.mark.parametrize("given", [lambda x, y: x[:1], lambda x, y: (x, y), lambda x, y: None])
def test_an_attack_that_returns_something_else_is_one_clear_error(given: Any) -> None:
    with pytest.raises(ValueError, match=r"expected the attack .* to return images of shape \(\d+, 3, 8, 8\), got"):
        evaluated(data(8), given)
