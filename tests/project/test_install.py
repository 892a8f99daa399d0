"""What is built and installed: the package with its types, which a type checker sees however it was installed."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastadv_adapters

PACKAGE = Path(fastadv_adapters.__file__).parent
ROOT = PACKAGE.parent
OFFLINE = ["--quiet", "--no-index", "--no-build-isolation", "--no-deps"]

GOOD = """\
import torch
import torchattacks  # type: ignore[import-untyped]
from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.foolbox import FastPyTorchModel
from fastadv_adapters.torchattacks import SafePGD as Attack, accelerate
from typing_extensions import assert_type
model = torch.nn.Linear(4, 3)
fast: FastAttackModel = FastAttackModel(model, dtype=torch.float16, engine="eager").update()
found: torch.Tensor = SafePGD(fast, eps=0.1, norm="l2", loss="dlr")(torch.rand(2, 4), torch.tensor([0, 1]))
attack = accelerate(torchattacks.PGD(model), decisions="exact", loss_scale=2.0)
own = assert_type(accelerate(Attack(model, norm="l1"), fuse_bn=False), Attack)
assert_type(FastPyTorchModel(model, bounds=(0, 1), channels_last="auto").fast, FastAttackModel)
again = FastAttackModel(model, engine=fast.engine)
"""
SETTINGS = """\
[mypy]
[mypy-torch.*]
follow_imports = skip
follow_imports_for_stubs = true
"""
"""PyTorch's own types, which take half a minute to read, are left out."""

BAD = [  # a line, and the error that is to be reported at it
    ('accelerate(torchattacks.PGD(model), decision="exact")', 'Unexpected keyword argument "decision".*"decisions"?'),
    ('FastPyTorchModel(model, bounds=(0, 1), engin="eager")', 'Unexpected keyword argument "engin".*"engine"?'),
    ('accelerate(torchattacks.PGD(model), decisions="exactly")', 'Argument "decisions" to "accelerate"'),
    ('SafePGD(fast, eps=0.1, norm="L2")', 'Argument "norm" to "SafePGD"'),
    ('Attack(model, norm="L2")', 'Argument "norm" to "SafePGD"'),
    ('SafePGD(fast, eps=0.1, loss="cw")', 'Argument "loss" to "SafePGD"'),
    ('FastAttackModel(model, engine="cuda")', 'Argument "engine" to "FastAttackModel"'),
]


def run(*command: str | Path, at: Path) -> subprocess.CompletedProcess[str]:
    """Run in a folder with nothing of the caller's on any path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done


def output(*command: str | Path, at: Path) -> str:
    done = run(*command, at=at)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def environment_in(folder: Path) -> tuple[Path, Path]:
    """A new environment without the package, and its site-packages; all else is seen through a path to this one's."""
    output(sys.executable, "-m", "venv", "--without-pip", folder, at=folder.parent)
    python = folder / "bin" / "python"
    site = Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", at=folder))
    (site / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return python, site


def wheel_of(source: Path, to: Path) -> Path:
    output(sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", to, source, at=to.parent)
    (wheel,) = to.glob("*.whl")
    return wheel


def sdist_of(source: Path, to: Path) -> Path:
    output(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", to, at=source)
    (sdist,) = to.glob("*.tar.gz")
    return sdist


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def python_files(folder: Path) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in folder.rglob("*.py")}


def type_errors(python: Path, at: Path) -> dict[str, dict[int, str]]:
    """The errors of mypy in an environment, strict and without the project's settings, by file and line."""
    (settings := at / "mypy.ini").write_text(SETTINGS)
    checker = [sys.executable, "-m", "mypy", "--strict", f"--config-file={settings}", f"--cache-dir={at / 'cache'}"]
    found: dict[str, dict[int, str]] = {"good.py": {}, "bad.py": {}}
    for line in run(*checker, "--python-executable", python, *found, at=at).stdout.splitlines():
        if match := re.fullmatch(r"(\w+\.py):(\d+): error: (.*)", line):
            found[match[1]][int(match[2])] = match[3]
    return found


@pytest.mark.long
def test_type_checkers_see_the_package_and_its_options_however_it_is_installed(tmp_path: Path) -> None:
    """One test for both, so that the types of other packages are read once."""
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(GOOD + "\n".join(line for line, _ in BAD) + "\n")
    expected = dict(enumerate((error for _, error in BAD), len(GOOD.splitlines()) + 1))
    for name, what in (("editable", ["--editable", ROOT]), ("wheel", [wheel_of(ROOT, tmp_path / "dist")])):
        python, site = environment_in(tmp_path / name)
        where = "import importlib.util as u; print(getattr(u.find_spec('fastadv_adapters'), 'origin', None))"
        assert output(python, "-c", where, at=tmp_path) == "None", "the environment should be empty"
        output(python, "-m", "pip", "install", *OFFLINE, "--ignore-installed", *what, at=tmp_path)
        package = PACKAGE if name == "editable" else site / PACKAGE.name
        assert Path(output(python, "-c", where, at=tmp_path)) == package / "__init__.py"
        found = type_errors(python, tmp_path)
        assert found["good.py"] == {}
        assert found["bad.py"].keys() == expected.keys(), found
        assert [text for line, text in found["bad.py"].items() if not re.match(expected[line], text)] == []


def test_a_wheel_holds_the_package_alone_and_its_version_is_the_one_that_the_package_says(tmp_path: Path) -> None:
    wheel = wheel_of(ROOT, tmp_path / "dist")
    assert names_in(wheel) == python_files(PACKAGE) | {"fastadv_adapters/py.typed"}
    assert wheel.name.split("-")[:2] == ["fastadv_adapters", fastadv_adapters.__version__]


def test_a_source_distribution_is_enough_to_build_and_to_test(tmp_path: Path) -> None:
    with tarfile.open(sdist_of(ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.name.startswith("fastadv_adapters-"))
    held = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    needed = {
        "pyproject.toml",
        "Makefile",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "docs/errors.md",
        "docs/faults.md",
        "docs/reliability.md",
        "CHANGELOG.md",
    }
    for folder in ("tests", "examples", "benchmarks"):
        needed |= python_files(ROOT / folder)
    assert sorted(needed - held) == []
    folders = {name.split("/")[0] for name in held if "/" in name}
    assert folders == {"fastadv_adapters", "tests", "examples", "benchmarks", "docs", ".github"}
    assert names_in(wheel_of(source, tmp_path / "dist")) == python_files(PACKAGE) | {"fastadv_adapters/py.typed"}
