"""What users of torchattacks rely on, with a fast model in the place of the plain one: the same at the same seed."""

import copy
import functools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastadv_adapters import FastAttackModel
from fastadv_adapters.torchattacks import SafePGD, accelerate
from tests.support.tools import attackable_net, batch

pytestmark = pytest.mark.usefixtures("untouched")

EPS = 0.02
OPTIONS: Any = {"dtype": torch.float32, "decisions": "exact", "logits_dtype": torch.float32}
USUAL: dict[str, Any] = {"defaults": {}, "bfloat16": {"dtype": torch.bfloat16}}

Make = Callable[[nn.Module], Any]
Swap = Callable[[Make, nn.Module], Any]

SWAPS: dict[str, Callable[..., Any]] = {
    "given": lambda make, net, **options: make(FastAttackModel(net, **options)),
    "accelerated": lambda make, net, **options: accelerate(make(net), **options),
}


@pytest.fixture(params=SWAPS)
def swap(request: pytest.FixtureRequest) -> Swap:
    """The two ways to have an attack run on a fast model, with options at which all is as on the plain one."""
    return functools.partial(SWAPS[request.param], **OPTIONS)


@pytest.fixture(params=USUAL)
def usual(request: pytest.FixtureRequest) -> Any:
    """Options as most give them: the gradients are rounded, so that images differ and only their strength is alike."""
    return USUAL[request.param]


@pytest.fixture(params=SWAPS)
def usual_swap(request: pytest.FixtureRequest, usual: Any) -> Swap:
    return functools.partial(SWAPS[request.param], **usual)


@pytest.fixture
def net() -> nn.Module:
    return attackable_net()


@pytest.fixture
def x() -> Tensor:
    return batch(10)[0]


@pytest.fixture
def many() -> Tensor:
    """As many images as counts of them mean something."""
    return batch(100)[0]


@pytest.fixture
def y(net: nn.Module, x: Tensor) -> Tensor:
    labels: Tensor = net(x).argmax(1)
    return labels


def seeded(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    random.seed(3)
    return run(*args, **kwargs)


def assert_same_images(found: Tensor, expected: Tensor, net: nn.Module) -> None:
    """Equal but for rare pixels whose gradient is so near to 0 that rounding decides its sign."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert float(((found - expected).abs() > 1e-5).float().mean()) < 0.005
    assert torch.equal(net(found).argmax(1), net(expected).argmax(1))


def assert_as_strong(found: Tensor, expected: Tensor, x: Tensor, y: Tensor, net: nn.Module) -> None:
    """Inside the same budget, and as often the class that it was."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert float((found - x).abs().max()) <= EPS + 1e-6
    left, wanted = (int((net(images).argmax(1) == y).sum()) for images in (found, expected))
    assert wanted <= 0.95 * len(x), "or an attack that does nothing would pass"
    assert abs(left - wanted) <= 0.05 * len(x)


def pgd(model: nn.Module) -> Any:
    return torchattacks.PGD(model, eps=EPS, alpha=0.006, steps=4)


ATTACKS: dict[str, Make] = {
    "PGD": pgd,
    "CW": lambda m: torchattacks.CW(m, c=5, steps=6, lr=0.05),
    "Square": lambda m: torchattacks.Square(m, eps=EPS, n_queries=10),
    "SafePGD": lambda m: SafePGD(m, eps=EPS, steps=4),
}
MODES: dict[str, Callable[[Any], None]] = {
    "default": lambda attack: attack.set_mode_default(),
    "label": lambda attack: attack.set_mode_targeted_by_label(),
    "random": lambda attack: attack.set_mode_targeted_random(),
    "least likely": lambda attack: attack.set_mode_targeted_least_likely(),
    "third least likely": lambda attack: attack.set_mode_targeted_least_likely(kth_min=3, quiet=True),
    "function": lambda attack: attack.set_mode_targeted_by_function(lambda x, y: (y + 1) % 10),
}


@pytest.mark.long
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("mode", MODES)
def test_modes(
    name: str, mode: str, swap: Swap, net: nn.Module, x: Tensor, y: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = net(x).topk(2).indices[:, 1] if mode == "label" else y
    results = []
    for attack in (ATTACKS[name](copy.deepcopy(net)), swap(ATTACKS[name], net)):
        MODES[mode](attack)
        images = seeded(attack, x, labels)
        results.append((images.detach(), attack.get_mode(), attack.targeted, capsys.readouterr().out))
    assert_same_images(results[1][0], results[0][0], net)
    assert results[1][1:] == results[0][1:]


@pytest.mark.long
@pytest.mark.parametrize("name", ["PGD", "SafePGD"])
@pytest.mark.parametrize("mode", ["default", "label", "least likely"])
def test_modes_at_usual_options(name: str, mode: str, usual_swap: Swap, net: nn.Module, many: Tensor) -> None:
    y, runner_up = net(many).topk(2).indices.T
    results = []
    for attack in (ATTACKS[name](copy.deepcopy(net)), usual_swap(ATTACKS[name], net)):
        MODES[mode](attack)
        results.append(seeded(attack, many, runner_up if mode == "label" else y).detach())
    assert_as_strong(results[1], results[0], many, y, net)


def test_a_mode_that_an_attack_has_not_is_the_same_error(swap: Swap, net: nn.Module) -> None:
    attack = swap(lambda m: torchattacks.APGD(m, eps=EPS, steps=2), net)
    with pytest.raises(ValueError, match="Targeted mode is not supported"):
        attack.set_mode_targeted_by_label()


def test_normalised_inputs(swap: Swap, net: nn.Module, x: Tensor) -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    results = []
    for attack in (pgd(copy.deepcopy(net)), swap(pgd, net)):
        attack.set_normalization_used(mean=mean, std=std)
        inputs = attack.normalize(x)
        torch.testing.assert_close(attack.get_logits(inputs), net(inputs))
        results.append(seeded(attack, inputs, net(inputs).argmax(1)))
        back = attack.inverse_normalize(results[-1])
        assert float((back - x).abs().max()) <= EPS + 1e-6
    assert_same_images(results[1], results[0], net)


def test_logits_device_and_model(swap: Swap, net: nn.Module, x: Tensor, y: Tensor) -> None:
    plain, fast = pgd(copy.deepcopy(net)), swap(pgd, net)
    torch.testing.assert_close(fast.get_logits(x), plain.get_logits(x))
    assert torch.equal(fast.get_output_with_eval_nograd(x), plain.get_output_with_eval_nograd(x))
    assert fast.device == plain.device
    fast.set_device("cpu")
    fast.set_model(FastAttackModel(net, **OPTIONS))
    assert_same_images(seeded(fast, x, y), seeded(plain, x, y), net)
    name = re.compile(r"(model_name|device)=\w+")
    assert name.sub("", repr(fast)) == name.sub("", repr(plain))


def test_the_modes_of_the_wrapped_model_are_its_own(swap: Swap, net: nn.Module, x: Tensor, y: Tensor) -> None:
    plain = copy.deepcopy(net)
    for module in net.modules():
        module.training = True
    net[3].training = False  # type: ignore[index]
    attack = swap(pgd, net)
    attack.set_model_training_mode(model_training=False, batchnorm_training=True, dropout_training=True)
    found = seeded(attack, x, y)
    assert [module.training for module in net.modules()].count(False) == 1
    assert_same_images(found, seeded(pgd(plain), x, y), plain)


# --- saved adversarial images -----------------------------------------------------------------------------------------


def loader(x: Tensor, y: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(x, y), batch_size=4 if len(x) < 100 else 40)


@pytest.mark.parametrize("kind", ["float", "int"])
def test_saved_images(
    kind: str, swap: Swap, net: nn.Module, x: Tensor, y: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "images.pt")
    results = []
    for attack in (pgd(copy.deepcopy(net)), swap(pgd, net)):
        save: Any = {"return_verbose": True, "save_predictions": True, "save_clean_inputs": True, "save_type": kind}
        accuracy, distance, _ = seeded(attack.save, loader(x, y), save_path=path, **save)
        loaded = attack.load(path, batch_size=len(x), load_predictions=True, load_clean_inputs=True)
        printed = re.sub(r"\(.*?it/s\)", "", capsys.readouterr().out)
        results.append((accuracy, round(distance, 4), printed, *next(iter(loaded))))
    plain, fast = results
    assert fast[:3] == plain[:3]
    assert_same_images(fast[3], plain[3], net)
    for found, expected in zip(fast[4:], plain[4:], strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(fast[5], net(fast[3]).argmax(1)), "predictions are those of the plain model"
    assert 0 < fast[0] < 100


def test_saved_images_at_usual_options(usual_swap: Swap, net: nn.Module, many: Tensor, tmp_path: Path) -> None:
    path, y = str(tmp_path / "images.pt"), net(many).argmax(1)
    results = []
    for attack in (pgd(copy.deepcopy(net)), usual_swap(pgd, net)):
        save: Any = {"verbose": False, "return_verbose": True, "save_predictions": True, "save_clean_inputs": True}
        accuracy, distance, _ = seeded(attack.save, loader(many, y), save_path=path, **save)
        loaded = attack.load(path, batch_size=len(many), load_predictions=True, load_clean_inputs=True)
        images, labels, predictions, *clean = next(iter(loaded))
        assert accuracy == pytest.approx(100 * float((net(images).argmax(1) == y).float().mean()))
        assert torch.equal(predictions, net(images).argmax(1)), "both are those of the plain model"
        assert torch.equal(labels, y)
        assert torch.equal(clean[0], many)
        results.append((images, distance))
    assert results[1][1] == pytest.approx(results[0][1], rel=0.05)
    assert_as_strong(results[1][0], results[0][0], many, y, net)


# --- attacks made of attacks ------------------------------------------------------------------------------------------


def multi(model: nn.Module) -> Any:
    square = torchattacks.Square(model, eps=EPS, n_queries=5)
    return torchattacks.MultiAttack([torchattacks.FGSM(model, eps=0.01), pgd(model), square], verbose=True)


def test_multi_attack(swap: Swap, net: nn.Module, x: Tensor, y: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for attack in (multi(copy.deepcopy(net)), swap(multi, net)):
        images = seeded(attack, x, y)
        saved = seeded(attack.save, loader(x, y), verbose=False, return_verbose=True)
        results.append((images, capsys.readouterr().out, saved[:2]))
    assert_same_images(results[1][0], results[0][0], net)
    assert results[1][1:] == results[0][1:]
    assert "Attack success rate" in results[1][1]


def test_multi_attack_at_usual_options(
    usual_swap: Swap, net: nn.Module, many: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    y = net(many).argmax(1)
    plain, fast = multi(copy.deepcopy(net)), usual_swap(multi, net)
    expected = seeded(plain, many, y)
    capsys.readouterr()
    found = seeded(fast, many, y)
    assert_as_strong(found, expected, many, y, net)
    fooled = 100 * float((net(found).argmax(1) != y).float().mean())
    assert float(capsys.readouterr().out.split("|")[-2].strip(" %")) == pytest.approx(fooled), "as the plain model says"


def test_a_multi_attack_takes_one_model_object(net: nn.Module) -> None:
    fast = FastAttackModel(net, **OPTIONS)
    with pytest.raises(ValueError, match="referencing a different model"):
        torchattacks.MultiAttack([pgd(fast), pgd(fast.view(decisions="auto"))])


def lgv(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    settings: Any = {"lr": 0.01, "epochs": 1, "nb_models_epoch": 2, "verbose": False}
    return torchattacks.LGV(net, loader(x, y), **settings, eps=EPS, alpha=0.006, steps=3)


@pytest.mark.parametrize("mode", ["default", "random", "least likely"])
def test_lgv(mode: str, net: nn.Module, x: Tensor, y: Tensor, tmp_path: Path) -> None:
    results, weights = [], []
    for name, attack in (("plain", lgv(copy.deepcopy(net), x, y)), ("fast", accelerate(lgv(net, x, y), **OPTIONS))):
        MODES[mode](attack)
        results.append(seeded(attack, x, y))
        attack.save_models(str(tmp_path / name))
        weights.append([torch.load(path)["state_dict"] for path in sorted((tmp_path / name).iterdir())])
    assert_same_images(results[1], results[0], net)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


def test_lgv_at_usual_options(usual: Any, net: nn.Module, many: Tensor) -> None:
    y = net(many).argmax(1)
    plain, fast = lgv(copy.deepcopy(net), many, y), accelerate(lgv(net, many, y), **usual)
    expected, found = (seeded(attack, many, y) for attack in (plain, fast))
    assert_as_strong(found, expected, many, y, net)
    collected, wanted = ([model.state_dict() for model in attack.list_models] for attack in (fast, plain))
    torch.testing.assert_close(collected, wanted, rtol=0, atol=0)


def test_lgv_with_models_loaded(net: nn.Module, x: Tensor, y: Tensor) -> None:
    results = []
    for wrap in (nn.Sequential, lambda model: FastAttackModel(model, **OPTIONS)):
        attack = lgv(wrap(net), x, y)
        attack.load_models([wrap(copy.deepcopy(net)), wrap(attackable_net())])
        results.append(seeded(attack, x, y))
    assert_same_images(results[1], results[0], net)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)], ids=str)
def test_an_attack_that_compares_clean_and_perturbed_logits_gets_exact_ones(
    net: nn.Module, dtype: torch.dtype, eps: float
) -> None:
    """The first steps change the logits by less than half precision shows."""
    x = batch(100, seed=4)[0]
    y = net(x).argmax(1)

    def tpgd(model: nn.Module) -> Any:
        return torchattacks.TPGD(model, eps=eps, alpha=eps / 2, steps=3)

    fast = FastAttackModel(net, dtype=dtype)
    attacks = [
        tpgd(copy.deepcopy(net)),
        accelerate(tpgd(net), dtype=dtype),
        tpgd(fast),
        tpgd(fast.view(decisions="fast")),
    ]
    plain, exact, auto, inexact = (int((net(seeded(attack, x, y)).argmax(1) == y).sum()) for attack in attacks)
    assert abs(exact - plain) <= 1
    assert abs(auto - plain) <= 1
    assert inexact > exact, "or exact decisions are not needed"
