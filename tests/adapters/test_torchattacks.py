"""torchattacks on fast models: as they are, swapped in, and the built-in attack in their dress."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torchattacks.attack import Attack

from fastadv_adapters import FastAttackModel
from fastadv_adapters.torchattacks import SafePGD, accelerate
from tests.boundary.test_function import Faulty
from tests.support.tools import attackable_net, batch, small_net

FLOAT32: Any = {"dtype": torch.float32}

pytestmark = pytest.mark.usefixtures("untouched")
BUDGET = 0.01


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A model in eval mode, images, and the labels that it gives them."""
    net = attackable_net()
    x, _ = batch(12)
    return net, x, net(x).argmax(1)


Make = Callable[[nn.Module], Any]
GRADIENT: dict[str, Make] = {
    "FGSM": lambda m: torchattacks.FGSM(m, eps=BUDGET),
    "PGD": lambda m: torchattacks.PGD(m, eps=BUDGET, alpha=0.003, steps=5),
    "PGDL2": lambda m: torchattacks.PGDL2(m, eps=0.1, alpha=0.03, steps=5),
    "MIFGSM": lambda m: torchattacks.MIFGSM(m, eps=BUDGET, alpha=0.003, steps=5),
    "TPGD": lambda m: torchattacks.TPGD(m, eps=BUDGET, alpha=0.003, steps=5),
    "APGD": lambda m: torchattacks.APGD(m, eps=BUDGET, steps=5),
    "APGDT": lambda m: torchattacks.APGDT(m, eps=BUDGET, steps=5, n_classes=10),
    "CW": lambda m: torchattacks.CW(m, c=5, steps=10, lr=0.05),
    "DeepFool": lambda m: torchattacks.DeepFool(m, steps=10),
    "FAB": lambda m: torchattacks.FAB(m, eps=BUDGET, steps=5, n_classes=10),
    "JSMA": lambda m: torchattacks.JSMA(m, theta=1.0, gamma=0.05),
    "EADL1": lambda m: torchattacks.EADL1(m, max_iterations=10, binary_search_steps=2, initial_const=1.0),
    "SparseFool": lambda m: torchattacks.SparseFool(m, steps=3),
    "PIFGSM": lambda m: torchattacks.PIFGSM(m, max_epsilon=BUDGET, num_iter_set=5),
    "Square": lambda m: torchattacks.Square(m, eps=BUDGET, n_queries=30),
}


def robust(net: nn.Module, attack: Any, x: Tensor, y: Tensor) -> int:
    torch.manual_seed(3)
    adversarial = attack(x, y)
    adversarial = adversarial[0] if isinstance(adversarial, tuple) else adversarial
    assert adversarial.isfinite().all()
    with torch.no_grad():
        return int((net(adversarial).argmax(1) == y).sum())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # SparseFool's own use of NumPy
@pytest.mark.parametrize("name", GRADIENT)
def test_attacks_are_as_strong_on_the_fast_model(name: str, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    plain = robust(net, GRADIENT[name](copy.deepcopy(net)), x, y)
    assert plain < len(x) - 2, "or an attack that does nothing would pass"
    fast = FastAttackModel(net, dtype=torch.float32)
    assert abs(robust(net, GRADIENT[name](fast), x, y) - plain) <= 1
    attack = GRADIENT[name](net)
    assert accelerate(attack, dtype=torch.bfloat16) is attack
    assert robust(net, attack, x, y) - plain <= 1


def test_each_attack_gets_the_view_that_suits_it(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, _, _ = problem
    attack = accelerate(torchattacks.AutoAttack(net, n_classes=10), dtype=torch.float32)
    views = {part.attack: part.model for part in attack._attacks.values()}
    assert {name: (v._decisions, v._logits_dtype) for name, v in views.items()} == {
        "MultiAttack": ("auto", torch.float64),
        "APGD": ("auto", torch.float64),
        "APGDT": ("auto", torch.float64),
        "FAB": ("exact", torch.float32),
        "Square": ("auto", torch.float32),
    }
    assert len({id(v._networks) for v in (attack.model, *views.values())}) == 1


def test_options_win_over_what_suits(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    options: dict[str, Any] = {"decisions": "fast", "logits_dtype": torch.float32, "dtype": torch.float32}
    attack = accelerate(torchattacks.CW(net, c=5, steps=3, lr=0.05), **options)
    assert (attack.model._decisions, attack.model._logits_dtype) == ("fast", torch.float32)
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        accelerate(torchattacks.FGSM(net), speed=11)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="expected a torchattacks attack, got Sequential: make the attack first"):
        accelerate(net)
    assert attack.get_logits(x).dtype == torch.float32
    assert robust(net, attack, x, y) <= 1


def test_autoattack_and_multiattack_as_a_whole(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    attacks = [torchattacks.FGSM(net, eps=BUDGET), torchattacks.PGD(net, eps=BUDGET, alpha=0.003, steps=3)]
    multi = torchattacks.MultiAttack(attacks)
    before = robust(net, multi, x, y)
    assert abs(robust(net, accelerate(multi, dtype=torch.float32), x, y) - before) <= 1
    fast = FastAttackModel(net, dtype=torch.float32)
    inside = torchattacks.MultiAttack([torchattacks.FGSM(fast, eps=BUDGET), torchattacks.PGD(fast, eps=BUDGET)])
    assert robust(net, inside, x, y) <= before + 1


def test_attacks_that_were_put_into_a_multiattack_later_are_made_fast_too(
    problem: tuple[nn.Module, Tensor, Tensor],
) -> None:
    net, x, y = problem
    later, inner = torchattacks.PGDL2(net, steps=2), torchattacks.MultiAttack([torchattacks.FGSM(net)] * 2)
    multi = torchattacks.MultiAttack([torchattacks.FGSM(net), torchattacks.FGSM(net)])
    inner.attacks[1] = later
    multi.attacks.append(inner)
    later.set_model_training_mode(True)
    with pytest.raises(RuntimeError, match="got PGDL2 set to training mode"):
        accelerate(multi)
    later.set_model_training_mode(False)
    accelerate(multi, dtype=torch.float32)
    parts = (multi, inner, *inner.attacks, *multi.attacks)
    assert all(isinstance(part.model, FastAttackModel) for part in parts)
    assert multi(x, y).shape == x.shape


def test_a_fast_model_in_training_mode_is_a_clear_error(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    attack = torchattacks.PGD(net)
    attack.set_model_training_mode(True)
    with pytest.raises(RuntimeError, match=r"got PGD set to training mode by set_model_training_mode\(True\)"):
        accelerate(attack)
    attack.set_model_training_mode(False)
    accelerate(attack, dtype=torch.float32)
    for late in (attack, torchattacks.PGD(FastAttackModel(net, dtype=torch.float32))):
        late.set_model_training_mode(True)
        with pytest.raises(RuntimeError, match="expected an attack on the model in eval mode, got one that sets it"):
            late(x, y)
    safe = SafePGD(net)
    with pytest.raises(RuntimeError, match="expected SafePGD on the model in eval mode"):
        safe.set_model_training_mode(True)
    safe.set_model_training_mode(False)


def loader(x: Tensor, y: Tensor) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


def test_lgv_collects_on_the_plain_model_and_attacks_fast(
    problem: tuple[nn.Module, Tensor, Tensor], tmp_path: Any
) -> None:
    net, x, y = problem
    settings: dict[str, Any] = {
        "lr": 0.01,
        "epochs": 1,
        "nb_models_epoch": 2,
        "verbose": False,
        "eps": 0.3,
        "alpha": 0.1,
        "steps": 10,
    }
    plain = robust(net, torchattacks.LGV(copy.deepcopy(net), loader(x, y), **settings), x, y)
    assert plain < len(x) - 2, "or an attack that does nothing would pass"
    lgv = accelerate(torchattacks.LGV(net, loader(x, y), **settings), dtype=torch.float32)
    assert abs(robust(net, lgv, x, y) - plain) <= 1
    assert not any(isinstance(m, FastAttackModel) for m in lgv.list_models)
    inner = lgv.base_attack.model.models
    assert [type(m) for m in inner] == [FastAttackModel, FastAttackModel]
    assert all(m.gradient_stats.passes > 0 for m in inner)
    with pytest.raises(RuntimeError, match="LGV, which trains its model"):
        torchattacks.LGV(FastAttackModel(net, dtype=torch.float32), loader(x, y), **settings)(x, y)


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("nothing is to be trained")


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dytpe": torch.float32}, TypeError, "expected options of FastAttackModel, got dytpe: check the name"),
    ({"dtype": "float32"}, ValueError, "expected dtype to be"),
    ({"fuse_bn": 1}, ValueError, "expected fuse_bn to be True or False"),
    ({"auto_update": None}, ValueError, "expected auto_update to be True or False"),
    ({"channels_last": "no"}, ValueError, "expected channels_last to be"),
    ({"loss_scale": -1}, ValueError, "expected loss_scale to be"),
    ({"decisions": "right"}, ValueError, "expected decisions to be one of"),
    ({"logits_dtype": torch.float16}, ValueError, "expected logits_dtype to be"),
    ({"engine": "steam"}, ValueError, "expected engine to be one of"),
]


@pytest.mark.parametrize(("options", "kind", "text"), WRONG, ids=[next(iter(options)) for options, *_ in WRONG])
def test_options_for_lgv_are_looked_at_before_its_models_are_trained(
    options: Any, kind: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchattacks.LGV, "collect_models", never)
    lgv = torchattacks.LGV(small_net().eval(), [], verbose=False)
    with pytest.raises(kind, match=text):
        accelerate(lgv, **options)
    assert lgv.attack_class is torchattacks.BIM


def test_an_lgv_that_is_accelerated_can_be_pickled_and_is_left_as_it_is() -> None:
    lgv = accelerate(torchattacks.LGV(small_net().eval(), [], verbose=True), dtype=torch.float32)
    made = lgv.attack_class
    assert accelerate(lgv).attack_class is made
    with pytest.raises(ValueError, match="a model that is fast already, got dtype"):
        accelerate(lgv, dtype=torch.float64)
    for other in (pickle.loads(pickle.dumps(lgv)), copy.deepcopy(lgv)):
        assert (other.attack_class.attack_class, other.attack_class.options) == (made.attack_class, made.options)
        other.load_models([small_net().eval(), small_net().eval()])
        x, y = batch(2)
        assert other(x, y).shape == x.shape
        assert all(isinstance(m, FastAttackModel) for m in other.base_attack.model.models)


class RobModel(nn.Module):
    """What torchattacks knows of MAIR's class of this name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.mean, self.std = net, torch.full((3,), 0.5), torch.full((3,), 0.2)

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


def test_the_normalisation_of_a_robmodel_is_kept_by_accelerate_alone(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    rob, x = RobModel(net).eval(), (x - 0.5) / 0.2
    fast = torchattacks.PGD(FastAttackModel(rob, **FLOAT32), steps=2, random_start=False)
    assert fast.normalization_used is None
    fast.set_normalization_used(rob.mean.tolist(), rob.std.tolist())
    found = accelerate(torchattacks.PGD(rob, steps=2, random_start=False), logits_dtype=torch.float32, **FLOAT32)(x, y)
    assert torch.equal(found, fast(x, y))
    assert torch.equal(found, torchattacks.PGD(rob, steps=2, random_start=False)(x, y))


class TestSafePGD:
    """The built-in attack as a torchattacks attack."""

    def test_on_plain_and_fast(self, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
        net, x, y = problem
        plain = SafePGD(net, eps=BUDGET, steps=5)
        assert "SafePGD(" in repr(plain)
        result = plain(x, y)
        assert float((result - x).abs().max()) <= BUDGET + 1e-7
        left = robust(net, plain, x, y)
        assert (
            abs(left - robust(net, SafePGD(FastAttackModel(net, dtype=torch.float32), eps=BUDGET, steps=5), x, y)) <= 1
        )
        assert left <= robust(net, torchattacks.PGD(net, eps=BUDGET, alpha=0.003, steps=5), x, y)
        assert abs(left - robust(net, accelerate(plain, dtype=torch.bfloat16), x, y)) <= 1

    def test_targeted_modes(self, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
        net, x, y = problem
        runner_up = net(x).topk(2).indices[:, 1]
        attack, target = SafePGD(net, eps=0.5, steps=20), runner_up
        attack.set_mode_targeted_by_label(quiet=True)
        hits = int((net(attack(x, target)).argmax(1) == target).sum())
        attack.set_mode_targeted_by_function(lambda images, labels: net(images).topk(2).indices[:, 1], quiet=True)
        assert abs(int((net(attack(x, y)).argmax(1) == target).sum()) - hits) <= 1
        assert hits > int((net(x).argmax(1) == target).sum())
        attack.set_mode_targeted_least_likely(quiet=True)
        assert attack(x, y).shape == x.shape

    def test_normalised_inputs(self, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
        net, x, y = problem
        mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
        shaped = [torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std)]
        normalised = (x - shaped[0]) / shaped[1]
        y = net(normalised).argmax(1)
        for attack in (SafePGD(net, eps=0.3, steps=5), torchattacks.PGD(net, eps=0.3, alpha=0.1, steps=5)):
            attack.set_normalization_used(mean=mean, std=std)
            result = attack(normalised, y)
            back = result * shaped[1] + shaped[0]
            assert float((back - x).abs().max()) <= 0.3 + 1e-5
            assert float(back.min()) >= -1e-5
            assert int((net(result).argmax(1) == y).sum()) < len(x)

    @pytest.mark.parametrize(
        ("dtype", "inside"),  # a MultiAttack undoes the normalisation itself, and in float32 what was in float16
        [
            (torch.float16, False),
            *((dtype, inside) for dtype in (torch.float32, torch.float64) for inside in (False, True)),
        ],
        ids=str,
    )
    def test_black_and_white_pixels_of_normalised_images_are_within_the_bounds(
        self, dtype: torch.dtype, inside: bool, problem: tuple[nn.Module, Tensor, Tensor]
    ) -> None:
        net, x, y = problem
        mean, std = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
        shaped = [torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in (mean, std)]
        images = x.round().to(dtype)
        normalised = (images - shaped[0]) / shaped[1]
        net = net.double() if dtype == torch.float64 else net
        attack = safe = SafePGD(net, eps=0.1, steps=1)
        if inside:
            attack = torchattacks.MultiAttack([safe, SafePGD(net, eps=0.1, steps=1)])
        attack.set_normalization_used(mean=mean, std=std)
        undone = Attack.inverse_normalize(attack, normalised)
        assert not torch.equal(undone, undone.clamp(0, 1)), "or there is nothing to put back"
        back = attack(normalised, y) * shaped[1] + shaped[0]
        assert float((back - images).abs().max()) <= 0.1 + 8 * max(
            torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
        )
        for out in (normalised - 0.1, normalised + 0.1):
            with pytest.raises(ValueError, match="expected x within bounds"):
                attack(out, y)

    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            ({"eps": -1.0}, "expected eps to be finite and at least 0, got -1.0"),
            ({"norm": "l3"}, "expected norm"),
            ({"loss": "mse"}, "expected loss"),
            ({"steps": -1}, "expected steps to be at least 0, got -1"),
            ({"early_stop": "False"}, "expected early_stop to be True or False, got 'False'"),
            ({"random_start": 0}, "expected random_start to be True or False, got 0"),
        ],
    )
    def test_wrong_settings(self, settings: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            SafePGD(small_net(), **settings)

    @pytest.mark.parametrize("fast", [False, True])
    def test_a_refused_call_leaves_the_normalisation_as_it_was(
        self, fast: bool, problem: tuple[nn.Module, Tensor, Tensor]
    ) -> None:
        net, x, _ = problem
        images = 0.5 + 0.5 * x  # normalised ones lie within [0, 1] too: raw ones for all that anybody can see
        normalised = (images - 0.5) / 0.5
        y = net(normalised).argmax(1)
        attack = SafePGD(FastAttackModel(net, **FLOAT32) if fast else net, eps=16 / 255, steps=5, random_start=False)
        attack.set_normalization_used(mean=[0.5] * 3, std=[0.5] * 3)
        before = attack(normalised, y)
        assert float((before - normalised).abs().max()) > 16 / 255 + 1e-5
        with pytest.raises(ValueError, match="expected labels below the number of classes"):
            attack(normalised, y + 10)
        assert torch.equal(attack(normalised, y), before)

    def test_the_mode_of_each_part_is_left_as_it_was(self) -> None:
        net, (x, y) = small_net().train(), batch(4)
        next(part for part in net.modules() if isinstance(part, nn.BatchNorm2d)).eval()
        modes = [part.training for part in net.modules()]
        assert True in modes
        assert False in modes
        attack = SafePGD(net, steps=1)
        attack(x, y)
        assert [part.training for part in net.modules()] == modes
        with pytest.raises(ValueError, match="expected x within bounds"):
            attack(x + 2, y)
        assert [part.training for part in net.modules()] == modes
        attack.save(loader(x, y), verbose=False, return_verbose=True)
        assert [part.training for part in net.modules()] == modes
        attack.set_mode_targeted_least_likely(quiet=True)
        attack(x, y)
        assert [part.training for part in net.modules()] == modes

    def test_wrong_inputs(self, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
        net, x, y = problem
        attack = SafePGD(net, eps=BUDGET)
        with pytest.raises(ValueError, match="NaN"):
            attack(torch.full_like(x, float("nan")), y)
        with pytest.raises(ValueError, match="10"):
            attack(x, torch.full_like(y, 10))
        with pytest.raises(ValueError, match=r"expected y of shape \(12,\)"):
            attack(x, y[:3])
        with pytest.raises(ValueError, match="bounds"):
            attack(x + 2, y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [torchattacks.PGD, torchattacks.PGDL2, torchattacks.MIFGSM], ids=lambda k: k.__name__)
def test_a_broken_gradient_gives_no_broken_image(kind: Any, value: float) -> None:
    net, (x, y) = Faulty([0, 2], value).eval(), batch(4)
    fast = FastAttackModel(net, dtype=torch.float32)
    assert kind(fast, steps=3)(x, y).isfinite().all()
    assert fast.gradient_stats.nonfinite == 6


def test_options_for_an_attack_on_a_fast_model_are_refused() -> None:
    attack = torchattacks.FGSM(FastAttackModel(small_net(), **FLOAT32))
    assert accelerate(attack) is attack
    with pytest.raises(ValueError, match="a model that is fast already, got dtype"):
        accelerate(attack, dtype=torch.float32)


def test_a_refused_acceleration_leaves_every_part_as_it_was() -> None:
    net = small_net().eval()
    good, bad = torchattacks.PGD(net), torchattacks.FGSM(net)
    both = torchattacks.MultiAttack([good, bad])
    bad._model_training = True
    with pytest.raises(RuntimeError, match="FGSM set to training mode"):
        accelerate(both)
    assert both.model is good.model is bad.model is net
