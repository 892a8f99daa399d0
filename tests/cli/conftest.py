"""A folder with a network, its weights and data, as a user has them, and the command run in it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from fastadv_adapters.cli.app import app

NETWORK = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(12, 3))

class Four(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(12, 4))

made = Net()
number = 3
pair = (torch.rand(6, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2]))
arrays = (pair[0].numpy(), pair[1].numpy())
like_bytes = (255 * pair[0], pair[1])

def data():
    return torch.utils.data.TensorDataset(*pair)

def raises():
    raise KeyError("no such file")

def other():
    return "a network"

def parallel():
    return nn.DataParallel(Net())

class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Net()

    def forward(self, x):
        return self.module(x)

def half(x):
    return x
"""

Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "networks_of_a_user.py").write_text(NETWORK, encoding="utf-8")
    torch.manual_seed(1)
    x, y = torch.rand(12, 3, 2, 2), torch.arange(12) % 3
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    save_file({"x": x, "y": y}, tmp_path / "data.safetensors")
    state = {"1.weight": torch.rand(3, 12), "1.bias": torch.zeros(3)}
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pt")
    return tmp_path


@pytest.fixture
def fastadv(folder: Path) -> Run:
    runner = CliRunner()

    def run(*arguments: str | Path) -> Result:
        return runner.invoke(app, [str(argument) for argument in arguments])

    return run
