"""What an evaluation goes on with: the same model, attacks and settings, whatever it is called in."""

import copy
import functools
import operator
from pathlib import Path
from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset

from fastadv_adapters import FastAttackModel, SafePGD, compare, evaluate
from fastadv_adapters.evaluation.confirming import Judge
from fastadv_adapters.evaluation.identity import model_hash, settings_of
from fastadv_adapters.evaluation.libraries import Foolbox, Function, Torchattack
from tests.evaluation.runs import EPS, FLOAT32, data, net


class Normalize(nn.Module):
    """As torchvision writes it: no buffers."""

    def __init__(self, mean: Any, std: Any) -> None:
        super().__init__()
        self.mean, self.std, self.calls, self.place = mean, std, 0, "cpu:0"

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x - torch.as_tensor(self.mean).view(-1, 1, 1)) / torch.as_tensor(self.std).view(-1, 1, 1)


def normalised(mean: Any, std: Any = (0.5, 0.5, 0.5)) -> nn.Module:
    return nn.Sequential(Normalize(mean, std), net()).eval()


@pytest.mark.parametrize("kind", [tuple, list, torch.tensor])
def test_a_model_with_other_settings_is_another_one(kind: Any, tmp_path: Path) -> None:
    one, other = normalised(kind([0.1, 0.2, 0.3])), normalised(kind([0.1, 0.2, 0.4]))
    assert settings_of(one) == settings_of(normalised(kind([0.1, 0.2, 0.3])))
    options: Any = {"eps": EPS, "output": tmp_path / "run", "options": FLOAT32, "progress": False, "limit": 8}
    first = evaluate(one, data(), "quick", **options)
    again = evaluate(one, data(), "quick", **options)
    assert again.samples == first.samples, "counts of calls and places are no settings"
    with pytest.raises(ValueError, match="model settings 0"):
        evaluate(other, data(), "quick", **options)


class Keeps(nn.Module):
    """Keeps what it sees, as people do who watch a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen, self.history, self.ema = net(), 0.0, list[float](), torch.zeros(())
        self.mean: Any = None
        self.rank, self.device_ids, self.shapes, self.is_begun = len(KEPT), [len(KEPT)], list[int](), False
        KEPT.append(self.rank)

    def forward(self, x: Tensor) -> Tensor:
        self.seen, self.is_begun = self.seen + float(len(x)), True
        self.mean, self.ema = x.detach().mean(), 0.9 * self.ema + 0.1 * x.detach().mean()
        self.history.append(float(self.mean))
        self.shapes.append(len(x))
        return self.net(x)  # type: ignore[no-any-return]


KEPT = list[int]()


def test_what_a_model_keeps_of_its_passes_is_no_setting(tmp_path: Path) -> None:
    options: Any = {"eps": EPS, "output": tmp_path / "run", "options": FLOAT32, "progress": False, "limit": 8}
    model = Keeps().eval()
    first = evaluate(model, data(), "safe-pgd-2", **options)
    for again in (model, Keeps().eval()):
        assert evaluate(again, data(), "safe-pgd-2", **options).samples == first.samples


class Doubles(nn.Module):
    """Writes into its input in passes without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2 - 1 if x.requires_grad else x.mul_(2).sub_(1)
        return self.net(x)  # type: ignore[no-any-return]


def test_models_that_write_into_their_input_leave_the_data_alone() -> None:
    (x, y), model = data(), Doubles().eval()
    before = x.clone()
    report = evaluate(model, (x, y), "safe-pgd-2", eps=EPS, progress=False, options=FLOAT32)
    assert len(report.samples) == len(x)
    compare(model, x, y, eps=EPS)
    assert torch.equal(x, before)


def test_a_layer_that_prints_other_settings_is_another_one() -> None:
    layers = [nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), nn.ReLU(), nn.Tanh()]
    assert len({model_hash(nn.Sequential(net(), layer)) for layer in layers}) == len(layers)


def pgd(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Tensor:
    return x


class Attacks:
    def __init__(self, steps: int) -> None:
        self.steps, self.queries = steps, 0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x


def normal(attack: Any, mean: float) -> Any:
    attack.set_normalization_used([mean] * 3, [0.5] * 3)
    return attack


DESCRIBED: dict[str, tuple[Any, Any]] = {
    "partial": (
        Function("a", functools.partial(pgd, steps=10)),
        Function("a", functools.partial(pgd, steps=100)),
    ),
    "object": (Function("a", Attacks(10)), Function("a", Attacks(100))),
    "repeated": (
        Foolbox("a", foolbox.attacks.LinfPGD(steps=10).repeat(3)),
        Foolbox("a", foolbox.attacks.LinfPGD(steps=20).repeat(3)),
    ),
    "attack inside": (
        Foolbox("a", foolbox.attacks.BoundaryAttack(init_attack=foolbox.attacks.SaltAndPepperNoiseAttack())),
        Foolbox("a", foolbox.attacks.BoundaryAttack()),
    ),
    "normalisation": (
        Torchattack("a", normal(torchattacks.PGD(net()), 0.1)),
        Torchattack("a", normal(torchattacks.PGD(net()), 0.2)),
    ),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_attacks_with_other_settings_are_described_otherwise(name: str) -> None:
    one, other = DESCRIBED[name]
    assert one.description != other.description
    assert " at 0x" not in one.description
    assert "queries" not in one.description


def test_callables_that_do_not_show_how_they_are_made_are_described() -> None:
    assert Function("a", operator.itemgetter(0)).description == "operator.itemgetter"


def test_attacks_in_another_order_are_another_evaluation(tmp_path: Path) -> None:
    options: Any = {"eps": EPS, "output": tmp_path / "run", "options": FLOAT32, "progress": False, "limit": 4}
    evaluate(net(), data(), ["safe-pgd-5", "safe-pgd-ce-5"], **options)
    with pytest.raises(ValueError, match="attacks"):
        evaluate(net(), data(), ["safe-pgd-ce-5", "safe-pgd-5"], **options)


def test_labels_are_no_targets() -> None:
    model = net()
    attack = torchattacks.PGD(model, eps=EPS, steps=2)
    attack.set_mode_targeted_by_label(quiet=True)
    for run in (
        lambda: evaluate(model, data(), attack, eps=EPS, progress=False),
        lambda: compare(model, *data(), attack=attack),
    ):
        with pytest.raises(ValueError, match="labels for the true classes"):
            run()
    attack.set_mode_targeted_random(quiet=True)
    assert evaluate(model, data(), attack, eps=EPS, progress=False, options=FLOAT32, limit=4).samples


@pytest.mark.filterwarnings("ignore:the fast model runs the module inside nn.DataParallel")
def test_an_attack_on_a_part_of_the_model_is_on_another_one() -> None:
    inner = net()
    model = nn.Sequential(Normalize((0.1, 0.1, 0.1), (1.0, 1.0, 1.0)), inner).eval()
    also = nn.Sequential(Normalize((0.2, 0.2, 0.2), (1.0, 1.0, 1.0)), inner).eval()  # of the same parameters
    same = nn.Sequential(model[0], inner).eval()
    for other in (inner, also, FastAttackModel(inner, **FLOAT32), nn.DataParallel(inner).eval()):
        for attack in (torchattacks.FGSM(other, eps=EPS), SafePGD(other, eps=EPS, steps=1)):
            report = evaluate(model, data(8), attack, eps=EPS, progress=False, options=FLOAT32)
            assert [note for note in report.notes if "was made of another model" in note]
    for own in (model, same, FastAttackModel(model, **FLOAT32), nn.DataParallel(model).eval()):
        for judged in (model, nn.DataParallel(model).eval()):
            attack = torchattacks.FGSM(own, eps=EPS)
            report = evaluate(judged, data(8), attack, eps=EPS, progress=False, options=FLOAT32)
            assert not [note for note in report.notes if "another model" in note]


def test_the_judge_makes_no_graph() -> None:
    x, y = data()
    judge = Judge(net(), 0)
    assert not judge.logits(x[:4]).requires_grad
    with torch.inference_mode():
        assert not judge.logits(x[:4] + 0).requires_grad
        assert not judge.verdicts(x[:4] + 0, y[:4]).logits.requires_grad


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")], ids=["no_grad", "inference", "device"]
)
def test_evaluations_run_in_any_mode_and_whatever_the_default_device_is(mode: Any) -> None:
    model, (x, y) = net(), data()
    attacks = [torchattacks.PGD(model, eps=EPS, steps=2), "safe-pgd-5"]
    wanted = evaluate(model, (x, y), attacks, eps=EPS, progress=False, options=FLOAT32, limit=8)
    with mode():
        found = evaluate(model, (x, y), attacks, eps=EPS, progress=False, options=FLOAT32, limit=8)
    assert [row.broken_by for row in found.samples] == [row.broken_by for row in wanted.samples]


def test_options_of_a_fast_model_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    original = FastAttackModel.view

    def noted(self: FastAttackModel, **options: Any) -> FastAttackModel:
        view = original(self, **options)
        seen.append(view._decisions)
        return view

    model = net()
    fast = FastAttackModel(model, dtype=torch.float32, decisions="exact")
    monkeypatch.setattr(FastAttackModel, "view", noted)
    attack = torchattacks.PGD(model, eps=EPS, steps=2)
    report = evaluate(fast, data(), attack, eps=EPS, progress=False, limit=4)
    assert "exact" in seen
    assert report.header["settings"]["options"]["decisions"] == "exact"


def test_an_attack_may_write_into_what_it_is_given() -> None:
    def writes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        y.zero_()
        return x.add_(EPS).clamp_(0, 1)

    def copies(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (x + EPS).clamp(0, 1)

    found, wanted = (
        evaluate(net(), data(), attack, eps=EPS, progress=False, options=FLOAT32) for attack in (writes, copies)
    )
    assert [row.broken_by is None for row in found.samples] == [row.broken_by is None for row in wanted.samples]
    assert found.denied == wanted.denied


class Right(nn.Module):
    """Right about as many of ten."""

    def __init__(self, right: int) -> None:
        super().__init__()
        self.right, self.unused = right, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        wrong = x[:, 0, 0, 0] * 10 >= self.right
        return torch.stack([~wrong, wrong], 1).float() + 0 * self.unused * x.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("right", [1, 2, 7])
def test_clean_accuracy_is_a_share(right: int) -> None:
    x = (torch.arange(10).float() / 10).view(-1, 1, 1, 1).expand(10, 3, 8, 8).contiguous() + 0.01
    report = evaluate(
        Right(right), (x, torch.zeros(10).long()), lambda m, x, y: x, eps=1e-6, progress=False, options=FLOAT32
    )
    assert report.clean_accuracy == right / 10 == report.by_attack["clean"]


def test_loaders_without_batches_and_with_a_sampler_of_their_own() -> None:
    x, y = data()
    whole: Dataset[Any] = TensorDataset(x, y)
    loader: Any = DataLoader(whole, batch_size=None)
    assert len(evaluate(net(), loader, "safe-pgd-2", eps=EPS, progress=False, options=FLOAT32).samples) == len(x)
    few: Any = DataLoader(whole, batch_size=4, sampler=SequentialSampler(range(6)))
    assert len(evaluate(net(), few, "safe-pgd-2", eps=EPS, progress=False, options=FLOAT32).samples) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_samples_leave_early_on_a_model_in_half_precision(dtype: torch.dtype) -> None:
    x, y = data()
    model = copy.deepcopy(net()).to(dtype)
    report = evaluate(model, (x.to(dtype), y), "safe-pgd-50", eps=16 * EPS, progress=False)
    broken = [row for row in report.samples if row.broken_by == "safe-pgd-50"]
    assert len(broken) > 20
    assert sum((row.backward or 0) < 25 for row in broken) > 0.8 * len(broken)
    assert report.borderline < 0.2 * len(x)
