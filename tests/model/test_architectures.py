"""A table of architectures: the fast float32 model against plain float64, and no trace on the wrapped model."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.modules.notices import FastAttackWarning
from tests.support.tools import CountOperators
from tests.zoo import ZOO, Specimen
from tests.zoo.registry import IMAGE, Headed

WARNING = [name for name, specimen in ZOO.items() if specimen.coupled or specimen.warns]
QUIET = [name for name in ZOO if name not in WARNING]
CHANGING = [name for name, specimen in ZOO.items() if specimen.change is not None]
FOLDING = [name for name, specimen in ZOO.items() if specimen.folds and name not in WARNING]


def as_list(outputs: Any) -> list[Tensor]:
    """The tensors of a tensor, a tuple or a dictionary."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, dict) else outputs)


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """All outputs, and the gradients of a fixed combination of them with respect to all inputs."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    outputs = as_list(model(*leaves))
    loss = torch.stack([weigh(output) for output in outputs if output.is_floating_point()]).sum()
    return [output.detach() for output in outputs], torch.autograd.grad(loss, leaves)


def weigh(output: Tensor) -> Tensor:
    """A scalar that every entry of `output` enters with another weight."""
    return (output * torch.linspace(-1, 1.5, output[0].numel(), dtype=output.dtype).view_as(output[0])).sum()


def wrap(model: nn.Module, specimen: Specimen, **options: Any) -> FastAttackModel:
    """A fast float32 model of one that has been in use, with all that this leaves on it."""
    as_list(model(*specimen.example(seed=7)))
    return FastAttackModel(model, dtype=torch.float32, **options)


def reference(specimen: Specimen, model: nn.Module, *, changed: bool = False) -> nn.Module:
    """The plain eval-mode network in float64 with the weights that `model` has now."""
    plain = specimen.build()
    if changed and specimen.change is not None:
        specimen.change(plain)
    plain.load_state_dict(model.state_dict())
    return plain.double().eval()


def assert_agrees(fast: nn.Module, plain: nn.Module, specimen: Specimen, *, cosine: float = 0.9999) -> None:
    """Outputs and gradients of every sample as those of `plain`, which is in float64."""
    inputs = specimen.example()
    outputs, gradients = run(fast, inputs)
    wanted_outputs, wanted_gradients = run(plain, tuple(x.double() for x in inputs))
    for output, wanted in zip(outputs, wanted_outputs, strict=True):
        error = (output.double() - wanted).reshape(len(output), -1).abs().amax(1)
        assert (error <= 1e-4 * wanted.reshape(len(output), -1).abs().amax(1)).all(), f"errors {error.tolist()}"
    for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
        assert wanted.flatten(1).any(1).all(), "the specimen has a sample without gradient"
        similarity = torch.cosine_similarity(gradient.double().flatten(1), wanted.flatten(1), 1)
        assert (similarity > cosine).all(), f"cosines {similarity.tolist()}"


@pytest.mark.parametrize("name", QUIET)
def test_fast_float32_agrees_with_plain(name: str) -> None:
    specimen = ZOO[name]
    model = specimen.build()
    assert_agrees(wrap(model, specimen), reference(specimen, model), specimen)


@pytest.mark.parametrize("name", WARNING)
def test_unusual_models_warn_once_for_each_reason_and_agree(name: str) -> None:
    specimen = ZOO[name]
    model = specimen.build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = wrap(model, specimen)
        for _ in range(2):
            assert_agrees(fast, reference(specimen, model), specimen, cosine=0.999)
    assert [warning.category for warning in caught] == [FastAttackWarning] * (specimen.coupled + specimen.warns)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", QUIET)
def test_half_precision_runs_without_warning_and_points_the_same_way(name: str, dtype: torch.dtype) -> None:
    specimen = ZOO[name]
    model = specimen.build()
    fast = FastAttackModel(model, dtype=dtype)
    outputs, gradients = run(fast, specimen.example())
    plain = reference(specimen, model)
    wanted_outputs, wanted_gradients = run(plain, tuple(x.double() for x in specimen.example()))
    assert (outputs[0] - wanted_outputs[0]).abs().max() < 0.1 * wanted_outputs[0].abs().max()
    for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
        # Far from 1: in networks this small one ReLU or sign that flips by rounding turns the gradient visibly.
        similarity = torch.cosine_similarity(gradient.double().flatten(1), wanted.flatten(1), 1)
        assert (similarity > 0.5).all(), f"cosines {similarity.tolist()}"
    assert fast.gradient_stats.zero == fast.gradient_stats.nonfinite == 0


class ReadInOneBranch(Headed):
    """Reads what a convolution gives in a branch that neither the trace nor the self-check takes."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y: Tensor = self.block(x)
        return self.classify(y + torch.sigmoid(self.block[0](x)) if x.mean() > 0.9 else y)


def test_layer_that_is_read_alone_later_is_right() -> None:
    specimen = Specimen("read_in_one_branch", ReadInOneBranch, (IMAGE,))
    model = specimen.build()
    fast = wrap(model, specimen)
    run(fast, specimen.example())
    bright = tuple(0.95 + 0.05 * x for x in specimen.example())
    with pytest.warns(FastAttackWarning, match="not folded into block.0, which the model also calls without"):
        found = run(fast, bright)
    torch.testing.assert_close(found, run(model, bright), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(run(fast, bright), run(model, bright), rtol=1e-3, atol=1e-4)


# --- no trace on the wrapped model ------------------------------------------------------------------------------------


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


def _freeze(value: object) -> object:
    """What must stay the same of an attribute: itself, and what containers hold, in order."""
    if isinstance(value, Tensor):
        gradient = value.grad if value.is_leaf else None
        kept = None if gradient is None else (id(gradient), _bits(gradient))
        return id(value), _bits(value), value.data_ptr(), value._version, value.requires_grad, kept
    if isinstance(value, dict):
        return id(value), [(key, _freeze(held)) for key, held in value.items()]
    if isinstance(value, list):
        return id(value), [id(held) for held in value]
    return id(value) if callable(value) else (id(value), repr(value))


def snapshot(model: nn.Module) -> dict[str, dict[str, object]]:
    """Every attribute of every submodule: tensors, `.grad`, hooks, modes, plain attributes."""
    return {
        name: {key: _freeze(value) for key, value in vars(module).items()} for name, module in model.named_modules()
    }


def mix_state(model: nn.Module) -> None:
    """Training mode but for every second submodule, some parameters frozen, some with a gradient."""
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        parameter.grad = torch.ones_like(parameter) if index % 4 == 1 else None


@pytest.mark.filterwarnings("ignore::fastadv_adapters.FastAttackWarning")
@pytest.mark.parametrize("name", ZOO)
def test_wrapped_model_keeps_no_trace(name: str) -> None:
    specimen = ZOO[name]
    model = specimen.build()
    model(*specimen.example(seed=7))
    mix_state(model)
    before = snapshot(model)
    fast = FastAttackModel(model, dtype=torch.float32)
    assert snapshot(model) == before, "construction"
    for _ in range(2):
        run(fast, specimen.example())
        with torch.no_grad():
            fast(*specimen.example())
        assert snapshot(model) == before, "attack"
        fast.update()
        assert snapshot(model) == before, "update"
    # Whichever mode the wrapped model is in, the eval-mode function is computed.
    assert_agrees(fast, reference(specimen, model), specimen, cosine=0.999)


# --- changes of the wrapped model -------------------------------------------------------------------------------------


def optimizer_step(model: nn.Module, specimen: Specimen) -> None:
    """One step of SGD, large enough to matter."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    weigh(as_list(model(*specimen.example(seed=2)))[0]).backward()
    optimizer.step()
    optimizer.zero_grad()


def in_place_change(model: nn.Module, specimen: Specimen) -> None:
    """Every parameter is multiplied in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def training_forward(model: nn.Module, specimen: Specimen) -> None:
    """Running statistics move, no parameter does."""
    model.train()
    with torch.no_grad():
        for seed in range(3):
            model(*(5 * x for x in specimen.example(seed)))
    model.eval()


def loaded_state(model: nn.Module, specimen: Specimen) -> None:
    """Another state dict is loaded."""
    state = {key: value * 1.1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)


Change = Callable[[nn.Module, Specimen], None]
CHANGES: tuple[Change, ...] = (optimizer_step, in_place_change, training_forward, loaded_state)


def _has_statistics(specimen: Specimen) -> bool:
    return any(getattr(module, "running_mean", None) is not None for module in specimen.build().modules())


@pytest.mark.parametrize("name", QUIET)
def test_update_follows_changed_weights(name: str) -> None:
    specimen = ZOO[name]
    model = specimen.build()
    fast = wrap(model, specimen, auto_update=False)
    for change in CHANGES:
        if change is training_forward and not _has_statistics(specimen):
            continue
        old = run(fast, specimen.example())[0][0]
        change(model, specimen)
        assert fast.update() is fast
        plain = reference(specimen, model)
        new = run(plain, tuple(x.double() for x in specimen.example()))[0][0]
        seen = f"{change.__name__} must be large enough to be seen"
        assert (new - old).abs().max() > 1e-3 * new.abs().max(), seen
        assert_agrees(fast, plain, specimen)


@pytest.mark.parametrize("name", CHANGING)
def test_update_follows_changed_attributes(name: str) -> None:
    specimen = ZOO[name]
    assert specimen.change is not None
    model = specimen.build()
    fast = wrap(model, specimen)
    old = run(fast, specimen.example())[0][0]
    specimen.change(model)
    fast.update()
    plain = reference(specimen, model, changed=True)
    new = run(plain, tuple(x.double() for x in specimen.example()))[0][0]
    assert (new - old).abs().max() > 1e-2 * new.abs().max(), "the change must be large enough to be seen"
    assert_agrees(fast, plain, specimen)


# --- what runs ----------------------------------------------------------------------------------------------------


def norm_calls(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """How often a forward pass for a gradient calls a batch norm operator of any kind."""
    with CountOperators() as counted:
        as_list(model(*(x.clone().requires_grad_() for x in inputs)))
    return sum(count for name, count in counted.calls.items() if "batch_norm" in name)


@pytest.mark.parametrize("name", FOLDING)
def test_no_batch_norm_operator_is_left(name: str) -> None:
    specimen = ZOO[name]
    model = specimen.build()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert bool(norm_calls(model, specimen.example())) == bool(norms), "the count must see the plain model's norms"
    fast = wrap(model, specimen, decisions="fast", engine="eager")  # torch.compile runs in no dispatch mode
    run(fast, specimen.example())  # the self-check at the first call runs the plain network too
    assert norm_calls(fast, specimen.example()) == 0, fast.summary()
