"""The core needs PyTorch alone, and an adapter whose library is missing says what to install."""

import subprocess
import sys

import pytest

BLOCK = "import sys; sys.modules.update(dict.fromkeys({names!r})); "
LIBRARIES = [
    "torchattacks",
    "pyautoattack",
    "foolbox",
    "eagerpy",
    "torchvision",
    "sklearn",
    "matplotlib",
    "rich",
    "safetensors",
    "torchmetrics",
    "typer",
    "safetensors",
    "torchmetrics",
]


def run_without(names: list[str], code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", BLOCK.format(names=names) + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_core_needs_torch_alone() -> None:
    code = (
        "import torch, fastadv_adapters as f, fastadv_adapters.autoattack; "
        "fast = f.FastAttackModel(torch.nn.Linear(4, 3)); x = torch.rand(2, 4); "
        "print(f.SafePGD(fast, eps=0.1)(x, torch.tensor([0, 1])).shape)"
    )
    result = run_without(LIBRARIES, code)
    assert result.stdout == "torch.Size([2, 4])\n", result.stderr


def test_a_first_attack_loads_no_compiler_and_no_algebra() -> None:
    code = (
        "import torch, fastadv_adapters as f; nn = torch.nn; "
        "net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 3)).eval(); "
        "x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 3; "
        "fast = f.FastAttackModel(net, dtype=torch.bfloat16); f.SafePGD(fast, eps=0.1)(x, y); fast(x); "
        "print(*(name for name in ('torch._dynamo', 'sympy') if name in sys.modules))"
    )
    result = run_without([], code)
    assert result.stdout == "\n", result.stdout + result.stderr  # each takes longer to load than such an attack


@pytest.mark.long
@pytest.mark.parametrize(
    ("adapter", "missing", "text"),
    [
        (
            "torchattacks",
            ["torchattacks"],
            "torchattacks to be installed, got none: pip install 'fastadv_adapters[torchattacks]'",
        ),
        ("foolbox", ["foolbox"], "foolbox and eagerpy to be installed: pip install 'fastadv_adapters[foolbox]'"),
        ("foolbox", ["eagerpy"], "foolbox and eagerpy to be installed: pip install 'fastadv_adapters[foolbox]'"),
    ],
)
def test_a_missing_library_is_named_with_its_pip_line(adapter: str, missing: list[str], text: str) -> None:
    result = run_without(missing, f"import fastadv_adapters.{adapter}")
    assert result.returncode == 1
    assert text in result.stderr
