"""What happens when something breaks; docs/faults.md names a test for each fault."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, FastAttackWarning, SafePGD
from tests.support.tools import batch, cosine, fingerprint, head_of, input_gradient, small_net

ROOT = Path(__file__).resolve().parents[2]
FLOAT32: Any = {"dtype": torch.float32}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def loss_of_each(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none").sum()


# --- numbers ----------------------------------------------------------------------------------------------------------


class Spoils(nn.Module):
    """Multiplies the maps of dark images by a value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.net, self.value = small_net(), value

    def forward(self, x: Tensor) -> Tensor:
        dark = x.detach().mean((1, 2, 3), keepdim=True) < 0.25
        y = self.net[0](x)
        out: Tensor = self.net[1:](y * torch.where(dark, self.value, 1.0).to(y.dtype))
        return out


@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_that_spoils_one_sample_spoils_no_other(dtype: torch.dtype, value: float) -> None:
    whole, spoilt, (x, y) = Spoils(1.0).eval(), Spoils(value).eval(), batch(4)
    x[2] *= 0.1
    fast = FastAttackModel(spoilt, dtype=dtype)
    expected = input_gradient(FastAttackModel(whole, dtype=dtype), x, y, loss_of_each)
    found = input_gradient(fast, x, y, loss_of_each)
    assert torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])
    assert found[2].count_nonzero() == 0
    assert fast.gradient_stats[:3] == (1, 4, 1)
    assert fast.gradient_stats.nonfinite_logits == 1
    adversarial = SafePGD(fast, eps=0.1, steps=2, random_start=False)(x, y)
    assert torch.equal(adversarial[2], x[2]), "nothing is known of it, so it is given back"
    assert adversarial.isfinite().all()
    assert not torch.equal(adversarial[0], x[0])


@DTYPES
def test_pixels_that_are_nan_spoil_their_own_sample_only(dtype: torch.dtype) -> None:
    fast, (x, y) = FastAttackModel(small_net(), dtype=dtype), batch(4)
    expected = input_gradient(fast, x, y, loss_of_each)
    x[1, 0, 3, 3] = float("nan")
    found = input_gradient(fast, x, y, loss_of_each)
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])
    assert found[1].count_nonzero() == 0
    assert fast.gradient_stats.nonfinite == 1
    with pytest.raises(ValueError, match="expected x to be finite, got NaN or infinite values in it"):
        SafePGD(fast, eps=0.1)(x, y)


@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_diverge_later_are_counted_and_done_with_once_they_are_mended(
    dtype: torch.dtype, value: float
) -> None:
    net, (x, y) = small_net().eval(), batch(3)
    fast, good = FastAttackModel(net, dtype=dtype), {key: v.clone() for key, v in net.state_dict().items()}
    expected = input_gradient(fast, x, y)
    for weight in (net[0].weight, head_of(net).weight):
        with torch.no_grad():
            weight[0] = value  # type: ignore[operator]
        fast.reset_gradient_stats()
        assert input_gradient(fast, x, y).count_nonzero() == 0
        assert fast.gradient_stats.nonfinite == fast.gradient_stats.nonfinite_logits == 3
        assert torch.equal(SafePGD(fast, eps=0.1, steps=1, random_start=False)(x, y), x)
        net.load_state_dict(good)
        assert torch.equal(input_gradient(fast, x, y), expected)


class Large(nn.Module):
    """Maps that leave float16's range inside of the network and are scaled back, too late."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
        with torch.no_grad():
            self.conv.weight.mul_(3e5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.conv(x) * 1e-5).mean((2, 3)))
        return out


def test_a_model_whose_forward_pass_overflows_in_float16_runs_in_float32() -> None:
    net, (x, y) = Large().eval(), batch(4)
    x[:2] *= 1e-4
    fast = FastAttackModel(net, dtype=torch.float16)
    with pytest.warns(FastAttackWarning, match=r"float32, since in torch\.float16 its outputs overflow"):
        found = input_gradient(fast, x, y, loss_of_each)
    torch.testing.assert_close(found, input_gradient(net, x, y, loss_of_each))
    assert (fast.gradient_stats.nonfinite, fast.gradient_stats.nonfinite_logits) == (0, 0)
    with torch.no_grad():
        assert torch.equal(fast(x), net(x))
    adversarial = SafePGD(fast, eps=0.1, steps=3, random_start=False)(x, y)
    before, after = (F.cross_entropy(net(images), y, reduction="none") for images in (x, adversarial))
    assert (after > before).all()


# --- memory -----------------------------------------------------------------------------------------------------------


class Greedy(nn.Module):
    """Runs out of memory when told to: on the way forth, back, in half precision, or for large batches."""

    when = "never"
    error: type[Exception] = torch.OutOfMemoryError
    text = "CUDA out of memory. Tried to allocate 2.00 GiB"

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net[:7](x)
        half = next(self.net.parameters()).dtype == torch.bfloat16
        if Greedy.when == "forward" or (Greedy.when == "half" and half) or (Greedy.when == "large" and len(x) > 4):
            raise Greedy.error(Greedy.text)
        if y.requires_grad:
            y.register_hook(lambda grad: self.back())
        out: Tensor = self.net[7](y)
        return out

    def back(self) -> None:
        if Greedy.when == "backward":
            raise Greedy.error(Greedy.text)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from inside torch.compile
@pytest.mark.parametrize(
    ("error", "text"),
    [(torch.OutOfMemoryError, Greedy.text), (RuntimeError, "DefaultCPUAllocator: can't allocate memory")],
)
@pytest.mark.parametrize("when", ["forward", "backward", "half"])
@pytest.mark.parametrize("checked", [True, False])
def test_out_of_memory_comes_through_as_it_is_and_changes_nothing(
    when: str, checked: bool, error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, (x, y) = Greedy().eval(), batch(3)
    options: Any = {"dtype": torch.bfloat16, "engine": "eager"}  # a recording would not run what raises
    fast, before = FastAttackModel(net, **options), fingerprint(net)
    if checked:
        input_gradient(fast, x, y)
    with monkeypatch.context() as patch:
        for name, value in {"when": when, "error": error, "text": text}.items():
            patch.setattr(Greedy, name, value)
        with pytest.raises(error, match=text):
            input_gradient(fast, x, y)
        with pytest.raises(error, match=text):
            SafePGD(fast, eps=0.1, steps=2)(x, y)
    assert fingerprint(net) == before
    assert (cosine(input_gradient(fast, x, y), input_gradient(net, x, y)) > 0.9).all()
    assert fast.dtype == torch.bfloat16, "it is no sign that the model cannot run in half precision"
    assert "note" not in fast.summary()


def test_after_out_of_memory_a_smaller_batch_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = Greedy().eval(), batch(6)
    fast = FastAttackModel(net, **FLOAT32)
    monkeypatch.setattr(Greedy, "when", "large")
    with pytest.raises(torch.OutOfMemoryError):
        input_gradient(fast, x, y)
    found = torch.cat([input_gradient(fast, *part, loss_of_each) for part in ((x[:3], y[:3]), (x[3:], y[3:]))])
    monkeypatch.undo()
    assert (cosine(found, input_gradient(net, x, y)) > 0.9999).all()


@pytest.mark.parametrize("structural", [True, False])
def test_out_of_memory_in_an_update_is_made_good_by_the_next(structural: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = small_net().eval(), batch(3)
    fast = FastAttackModel(net, **FLOAT32)
    input_gradient(fast, x, y)
    with torch.no_grad():
        net[0].weight.mul_(-1)  # type: ignore[operator]
    if structural:
        vars(net)["flag"] = True

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("fastadv_adapters.networks.pair.build_fast", full)
        patch.setattr(type(fast._networks.folded.refreshes[-1]), "__call__", full)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                fast(x)
    assert (cosine(input_gradient(fast, x, y), input_gradient(net, x, y)) > 0.9999).all()


# --- the table --------------------------------------------------------------------------------------------------------


def named_tests() -> set[tuple[str, str]]:
    """File and function of every test that exists."""
    return {
        (path.relative_to(ROOT / "tests").as_posix(), node.name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_test_that_the_page_of_faults_names_exists() -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| fault |")]
    assert len(rows) > 25
    existing = named_tests()
    for row in rows:
        named = re.findall(r"\[`(test_\w+)`\]\(\.\./tests/(\w+/test_\w+\.py)\)", row)
        assert named, f"no test shows this: {row}"
        assert [(file, name) for name, file in named if (file, name) not in existing] == []
