"""The recipes run, at small sizes, and what is fast in them follows the model that is trained."""

import ast
import importlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from digits import DigitsNet, grey_digits
from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.boundary import Packed
from fastadv_adapters.networks import pair
from tests.support.torchvision import hide_if_broken

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "common")
ELSEWHERE = {"ddp", "robustbench_models"}
"""Two processes; a library that downloads: each has a test of its own."""

SMALL = {"epochs": 1, "images": 96, "width": 4}
OTHER: dict[str, dict[str, Any]] = {"torch_compile": {"backend": "eager", "images": 64}}  # one size, one graph
AS_LIGHTNING_WARNS = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:The 'train_dataloader' does")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FastAttackModel]:
    """The fast models that a test makes."""
    found: list[FastAttackModel] = []
    original = FastAttackModel.__init__

    def noted(self: FastAttackModel, model: nn.Module, **options: Any) -> None:
        original(self, model, **options)
        found.append(self)

    monkeypatch.setattr(FastAttackModel, "__init__", noted)
    return found


def tensor_of(outputs: Any) -> torch.Tensor:
    return Packed(outputs).tensors[0].detach().float()


def far(fast: FastAttackModel) -> float:
    """How far the fast network's outputs are from the wrapped model's, relative to its largest."""
    x = grey_digits().test_images[:32]
    fast.wrapped.eval()
    with torch.no_grad():
        plain, ours = tensor_of(fast.wrapped(x)), tensor_of(fast.view(decisions="fast")(x))
    return float((ours - plain).abs().max() / plain.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_short_and_says_what_changes(name: str) -> None:
    text = (RECIPES / f"{name}.py").read_text(encoding="utf-8")
    title, blank, *body = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    assert len(text.splitlines()) < 100
    assert len(title) < 60
    assert not blank
    assert len(" ".join(body).split(". ")) >= 2
    assert "# <- fast" in text


@AS_LIGHTNING_WARNS
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_a_recipe_runs_and_its_fast_models_follow(
    name: str, made: list[FastAttackModel], capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "lightning_module":
        hide_if_broken()
    clean, robust = importlib.import_module(name).main(**(SMALL | OTHER.get(name, {})))
    shown = [float(number) for number in re.findall(r"(\d+\.\d)%", capsys.readouterr().out)]
    assert {round(100 * clean, 1), round(100 * robust, 1)} <= set(shown)
    assert 0 <= robust <= clean <= 1 or name == "patch_attack"  # any patch may help a network that is hardly trained
    assert made
    for fast in made:
        assert far(fast) < 0.05


@AS_LIGHTNING_WARNS
def test_a_lightning_module_that_attacks_itself_is_not_built_anew_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refers to its trainer, which counts steps."""
    hide_if_broken()
    recipe = importlib.import_module("lightning_module")
    builds, rebuild = list[int](), pair.Networks._rebuild

    def noted(self: pair.Networks) -> None:
        builds.append(1)
        rebuild(self)

    monkeypatch.setattr(pair.Networks, "_rebuild", noted)
    found = []
    for batches in (2, 5):
        module = recipe.Robust(width=4)
        module.attack = SafePGD(FastAttackModel(module), eps=0.1, steps=1, loss="ce")
        data = grey_digits()
        rows = TensorDataset(data.train_images[: 8 * batches], data.train_labels[: 8 * batches])
        builds.clear()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = recipe.lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
        trainer.fit(module, DataLoader(rows, batch_size=8))
        found.append(len(builds))
    assert found == [1, 1]  # once the trainer is there


def test_processes_keep_the_same_weights() -> None:
    """As torchrun starts them, without the seconds that torchrun itself takes."""
    code = f"import ddp; ddp.main(**{SMALL})"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    folders = os.pathsep.join(map(str, (RECIPES.parents[1], RECIPES)))
    common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": folders, "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=common | {"RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    first, second = (process.communicate(timeout=300)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert "processes: 2; the weights are the same in all: True" in first
    assert not second


def test_robustbench_is_asked_as_it_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shape alone: its models and data are downloaded, which no test does."""
    asked: list[tuple[nn.Module, dict[str, Any]]] = []
    data = grey_digits()

    def benchmark(model: nn.Module, **options: Any) -> tuple[float, float]:
        asked.append((model.to("cpu"), options))
        return 0.9, 0.5

    parts = {
        "data": {"load_cifar10": lambda n_examples: (data.test_images[:n_examples], data.test_labels[:n_examples])},
        "eval": {"benchmark": benchmark},
        "utils": {"load_model": lambda model_name, dataset, threat_model: DigitsNet(width=4)},
    }
    monkeypatch.setitem(sys.modules, "robustbench", ModuleType("robustbench"))
    for name, content in parts.items():
        monkeypatch.setitem(sys.modules, f"robustbench.{name}", SimpleNamespace(**content))  # type: ignore[arg-type]
    clean, robust = importlib.import_module("robustbench_models").main(images=8)
    assert 0 <= robust <= clean <= 1
    (plain, options), (fast, same) = asked
    assert options == same == {"n_examples": 8, "dataset": "cifar10", "threat_model": "Linf", "eps": 8 / 255}
    assert isinstance(fast, FastAttackModel)
    assert fast.wrapped is plain
    assert "benchmark of the fast model: 90.0% clean, 50.0% robust" in capsys.readouterr().out


def test_what_a_recipe_has_installed_leaves_the_pinned_versions() -> None:
    """Without the constraints pip replaces what torchattacks needs (`idna` for its `requests`)."""
    sources = "".join((RECIPES / f"{name}.py").read_text(encoding="utf-8") for name in NAMES)
    named = re.findall(r'"[^"]*pip install ((?!\S+ \S+ git\+)[^"]+)"', sources)
    assert sorted(line.rpartition(" ")[2] for line in named) == ["accelerate", "lightning", "timm", "transformers"]
    assert [line for line in named if not line.startswith("--constraint constraints.txt ")] == []


def test_a_library_that_is_missing_is_one_line() -> None:
    from common import needs

    with pytest.raises(SystemExit, match=r"No module named 'not_there'.*: pip install it"), needs("pip install it"):
        importlib.import_module("not_there")
