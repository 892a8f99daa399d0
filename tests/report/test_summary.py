"""The summary: sizes that do not suit tensor cores, and what it says of them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.shared.networks import VisionTransformer, WideResNet, resnet18
from fastadv_adapters import FastAttackModel
from fastadv_adapters.report import summary
from fastadv_adapters.report.alignment import Misfit, misfits
from fastadv_adapters.report.summary import in_groups, tensor_core_lines

HALF = torch.float16


def found(model: nn.Module) -> list[tuple[str, int, int, str]]:
    return [(layer.name, layer.inputs, layer.outputs, layer.usual) for layer in misfits(model, "cuda", HALF)]


def residual() -> nn.Module:
    return resnet18(width=8)


LAYERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, int, int, str]]]] = {
    "multiples of 8": (lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(16, 24)), []),
    "usual first and last": (residual, [("stem.0.0", 3, 8, "first"), ("head", 64, 10, "last")]),
    "one channel": (lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Linear(8, 8)), [("0", 1, 8, "first")]),
    "odd first layer": (lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.Linear(8, 8)), [("0", 3, 12, "")]),
    "odd features in front of the last": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(20, 10)),
        [("1", 20, 10, "")],
    ),
    "most work first": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3), nn.Linear(16, 10)),
        [("2", 12, 12, ""), ("1", 8, 12, ""), ("0", 3, 8, "first"), ("3", 16, 10, "last")],
    ),
    "per group": (lambda: nn.Conv2d(32, 32, 3, groups=8), [("", 4, 4, "")]),
    "groups that fit": (lambda: nn.Conv2d(32, 32, 3, groups=4), []),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(20, 40, 3, groups=20), nn.Linear(8, 8)), []),
    "transposed": (lambda: nn.ConvTranspose2d(16, 12, 2), [("", 16, 12, "last")]),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(12, 16, 3), nn.Linear(8, 8)), [("0", 12, 16, "")]),
    "attention whose heads do not fit": (
        lambda: nn.MultiheadAttention(24, 2),
        [("", 24, 12, "")],
    ),
    "nothing with a size": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), []),
}


@pytest.mark.parametrize("case", LAYERS)
def test_names_the_layers_whose_sizes_are_no_multiples_of_8(case: str) -> None:
    make, wanted = LAYERS[case]
    assert found(make()) == wanted


@pytest.mark.parametrize(
    ("device", "dtype", "number"),
    [
        ("cuda", torch.float16, 2),
        ("cuda", torch.bfloat16, 2),
        ("cuda", torch.float32, 0),
        ("cpu", torch.bfloat16, 0),
        ("mps", torch.float16, 0),
    ],
)
def test_only_for_half_precision_on_cuda(device: str, dtype: torch.dtype, number: int) -> None:
    assert len(misfits(residual(), device, dtype)) == number


@pytest.mark.parametrize(("inputs", "outputs", "factor"), [(3, 64, 8 / 3), (512, 10, 1.6), (12, 12, 16 * 16 / 144)])
def test_the_cost_is_the_work_of_the_padded_layer(inputs: int, outputs: int, factor: float) -> None:
    layer = Misfit("", inputs, outputs, "channels", 1, "")
    assert layer.factor == pytest.approx(factor)
    assert all(size % 8 == 0 for size in layer.padded)


def test_lines_say_what_it_costs_and_what_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 20, 3), nn.Linear(24, 10))
    assert tensor_core_lines(misfits(model, "cuda", HALF)) == [
        "  tensor cores   3 with sizes that are no multiples of 8; see docs/guides/options.md#sizes-for-tensor-cores",
        "    1  12 -> 20 channels: padded to 16 -> 24 it is 1.60 times the work; better 16 -> 24",
        "    0  3 -> 12 channels: padded to 8 -> 16 it is 3.56 times the work; better 3 -> 16",
        "    2  24 -> 10 features: padded to 24 -> 16 it is 1.60 times the work; cheap: usual for a last layer",
    ]


def test_long_lists_are_cut() -> None:
    lines = tensor_core_lines(misfits(VisionTransformer(image=16, width=36, depth=6, heads=3), "cuda", HALF))
    assert len(lines) == 10
    assert lines[-1] == "    and 18 with less work"


def test_nothing_is_said_where_everything_fits() -> None:
    assert tensor_core_lines([]) == []
    assert "tensor cores" not in FastAttackModel(residual()).summary()  # on a CPU


def test_the_summary_ends_with_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = WideResNet(depth=10, width=1)
    fast = FastAttackModel(model, dtype=torch.float16)
    asked: list[tuple[str, torch.dtype]] = []

    def as_on_cuda(module: nn.Module, device_type: str, dtype: torch.dtype) -> list[Misfit]:
        assert module is model
        asked.append((device_type, dtype))
        return misfits(module, "cuda", dtype)

    monkeypatch.setattr(summary, "misfits", as_on_cuda)
    lines = fast.summary().splitlines()
    assert asked == [("cpu", torch.float16)]
    assert lines[-2].startswith("    body.0  3 -> 16 channels: padded to 8 -> 16 it is 2.67 times the work")
    assert lines[-1].startswith("    head    64 -> 10 features: padded to 64 -> 16 it is 1.60 times the work")


def test_batch_norms_that_differ_in_numbers_alone_share_a_line() -> None:
    lines = FastAttackModel(WideResNet(depth=16, width=1), dtype=torch.float32).summary().splitlines()
    assert lines[lines.index("  batch norm     6 folded, 7 frozen") + 1 :] == [
        "    body.*.norm1 (6)  frozen into scale and shift: no layer before it that it alone reads",
        "    body.*.norm2 (6)  folded into body.*.conv1",
        "    body.7            frozen into scale and shift: no layer before it that it alone reads",
    ]
    assert in_groups({"a.0.1": "folded into a.0.0", "a.12.1": "folded into a.12.0", "a.2.1": "kept", "b": "kept"}) == {
        "a.*.1 (2)": "folded into a.*.0",
        "a.2.1": "kept",
        "b": "kept",
    }
    assert in_groups({"1": "folded into 0", "4": "folded into 3"}) == {"layer * (2)": "folded into layer *"}
    assert in_groups({"1": "folded into 0", "4": "kept"}) == {"layer 1": "folded into layer 0", "layer 4": "kept"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lines_are_short_and_one_says_what_to_expect(dtype: torch.dtype) -> None:
    text = FastAttackModel(residual(), dtype=dtype).summary()
    assert max(map(len, text.splitlines())) <= 115
    assert ("no half precision, so the gain is smaller" in text) == (dtype == torch.float32)


@pytest.mark.parametrize(("there", "said"), [(True, "the faster the larger"), (False, "slower than float32")])
def test_half_precision_without_hardware_for_it_is_said_to_be_slow(
    there: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "is_in_hardware", lambda dtype, device: there)
    assert "  speed          half precision" in (text := FastAttackModel(residual(), dtype=torch.bfloat16).summary())
    assert said in text


@pytest.mark.parametrize(("layers", "text"), [(0, "no activations"), (1, "1 activation"), (2, "2 activations")])
def test_counts_activations_in_place(layers: int, text: str) -> None:
    pairs = [layer for _ in range(layers) for layer in (nn.Conv2d(3, 3, 3), nn.ReLU())]
    fast = FastAttackModel(nn.Sequential(*pairs, nn.Flatten(), nn.Linear(3, 2)), dtype=torch.float32)
    assert f"  in place       {text}\n" in fast.summary()


def test_a_fast_model_that_is_little_more_than_the_plain_one_shows_it() -> None:
    """As README says: in these lines."""
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(2, 3, 2, 2, requires_grad=True)
    fast = FastAttackModel(net)
    fast(x).sum().backward()
    lines = dict(line.split(maxsplit=1) for line in fast.summary().replace("batch norm", "batch-norm").splitlines()[1:])
    assert lines["dtype"].startswith("float32 (")
    assert lines["speed"].startswith("no half precision, nothing folded: perhaps no gain")
    assert lines["batch-norm"] == "none in this model"
