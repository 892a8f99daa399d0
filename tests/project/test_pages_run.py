"""Every block of code in the README and the docs runs as it stands, and every command line names what there is."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import torchattacks
from safetensors.torch import save_file
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from torch import nn
from typer.testing import CliRunner

from digits import DigitsNet, grey_digits
from fastadv_adapters import FastAttackModel
from fastadv_adapters.cli.app import app
from fastadv_adapters.comparison import comparing

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SETTINGS = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
EXTRAS = re.findall(r"^(\w+) = \[", SETTINGS.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def fault_of(line: str) -> str | None:
    """What a command line names that is not there."""
    command = line.split("  #")[0].strip()
    if made := re.match(r"make ([\w-]+)", command):
        return None if made[1] in TARGETS else f"no target {made[1]}"
    if extras := re.search(r"pip install .*\[([\w,]+)\]", command):
        missing = set(extras[1].split(",")) - set(EXTRAS)
        return f"no extra {missing}" if missing else None
    if script := re.match(r"(?:python|torchrun .*?) (\w+/[\w/]+\.py)", command):
        return None if (ROOT / script[1]).exists() else f"no {script[1]}"
    if module := re.match(r"python -m ([\w.]+)", command):  # that it can be run is looked at in test_paths.py
        return None if module[1].split(".")[0] in ("benchmarks", "fastadv_adapters", "pytest") else f"no {module[1]}"
    known = ("", "git clone ", "cd ", "pip install ", "torchrun ", "fastadv ", "pre-commit ", "echo ")
    return None if not command or command.startswith(known[1:]) else f"no command {command}"


def shell(example: Example) -> str | None:
    """Lines of our own command run, on few images; others are read alone, for they install, or take minutes."""
    for line in example.parsed.splitlines():
        if line.startswith("fastadv ") and line != "fastadv demo":
            few = ["--repeats", "1", "--limit", "8"] if line.startswith("fastadv compare") else []
            result = CliRunner().invoke(app, [*shlex.split(line)[1:], *few])
            if result.exit_code:
                return f"{line} ended with {result.exit_code}: {result.output}"
    return "; ".join(filter(None, map(fault_of, example.parsed.splitlines()))) or None


def change(example: Example) -> None:
    """What stood there before a change runs on a model of its own, and so does what stands there after it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    names = {"model": model, "x": torch.rand(2, 3, 2, 2), "y": torch.tensor([0, 1]), "torchattacks": torchattacks}
    for left_out in "+-":
        lines = [line[2:] for line in example.parsed.splitlines() if line[0] != left_out]
        exec("\n".join(lines), {**names, "FastAttackModel": FastAttackModel})


SYBIL = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser("bash", shell),
        CodeBlockParser("diff", change),
        SkipParser(),
    ]
)


WORDS = ("recipes", "several-gpus")
"""Guides without code of their own."""


def languages(page: Path) -> set[str]:
    return set(re.findall(r"^ *```([^\s`]+)", page.read_text(encoding="utf-8"), re.MULTILINE))


def as_after_the_demo(folder: Path) -> None:
    """What the lines of the README find that come after the demo, but for the training."""
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "build" / "demo").mkdir(parents=True)
    data = grey_digits(test_size=8)
    save_file(DigitsNet().state_dict(), folder / "build" / "demo" / "adversarial.safetensors")
    save_file({"x": data.test_images, "y": data.test_labels}, folder / "build" / "demo" / "digits.safetensors")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page share one namespace, in order."""
    assert languages(page) <= {"python", "bash", "diff", "{toctree}", "{include}", "{eval-rst}"}, "what runs those?"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparing, "LEAST_SECONDS", 0.0)  # nobody looks at the times
    if page.stem == "README":
        as_after_the_demo(tmp_path)
    document = SYBIL.parse(page)
    for example in document.examples():
        example.evaluate()


def test_pages_show_code() -> None:
    blocks = {page: len(re.findall(r"^```python", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES}
    assert blocks[ROOT / "README.md"] >= 2
    assert all(blocks[guide] for guide in PAGES if guide.parent.name == "guides" and guide.stem not in WORDS)


def test_a_command_that_names_nothing_is_found() -> None:
    wrong = ["make nothing", "pip install 'fastadv_adapters[gone]'", "python -m nowhere.at_all", "frobnicate"]
    assert all(map(fault_of, wrong))
    assert not any(
        map(fault_of, ["make test", "pip install -e '.[torchattacks,foolbox]'", "python -m benchmarks.speed"])
    )


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name in ("guides", "trust")], ids=lambda p: p.stem
)
def test_no_code_hides_in_an_indented_block(page: Path) -> None:
    """Nothing would run it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"(?<=\n\n) {4}\S.*", text) == []
