"""Files and modules that the documentation and the comments name exist: nothing is called by the name that it had."""

import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.torchvision import hide_if_broken

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("fastadv_adapters", "tests", "benchmarks", "examples", "docs")
PAGES = [ROOT / "README.md", ROOT / "Makefile", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted(path for folder in ("fastadv_adapters", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
WINGS = sorted(path.parent for path in (ROOT / "fastadv_adapters").glob("*/__init__.py"))

PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*")
FILE = re.compile(r"`([\w/.-]+\.py)`")
DOTTED = re.compile(r"(?<![\w/.-])(?:fastadv_adapters|benchmarks)(?:\.\w+)+")
RUN = re.compile(r"python -m ((?:fastadv_adapters|benchmarks)[\w.]*\w)")
ROLE = re.compile(r":(?:func|class|meth|attr|data|exc|mod):`~?([\w.]+)`")


def missing_paths(text: str) -> Iterator[str]:
    """Paths from the top of the repository, or links from the pages; one with a star stands for at least one file."""
    for path in (path.rstrip("./") for path in PATH.findall(text)):
        if not any((*ROOT.glob(path), *(ROOT / "docs").glob(path))):
            yield path


def missing_files(text: str, folder: Path) -> Iterator[str]:
    """Python files in backticks: named from the top, from the package's top, or from the folder of who names them."""
    for name in FILE.findall(text):
        if not any((start / name).is_file() for start in (ROOT, ROOT / "fastadv_adapters", folder)):
            yield name


def missing_modules(text: str) -> Iterator[str]:
    """Dotted names of modules, and of what is in them."""
    hide_if_broken()  # of a metric, which imports torchmetrics
    for name in DOTTED.findall(text):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            yield name


def missing_commands(text: str) -> Iterator[str]:
    """What `python -m` cannot run."""
    for name in RUN.findall(text):
        path = ROOT / name.replace(".", "/")
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            yield f"python -m {name}"


def missing_roles(source: str) -> Iterator[str]:
    """Names that a docstring refers to as if they stood in the same file, or were imported there."""
    known = set[str]()
    for node in ast.walk(ast.parse(source)):
        known |= {
            getattr(node, key) for key in ("name", "asname", "id", "attr") if isinstance(getattr(node, key, 0), str)
        }
    for name in ROLE.findall(source):
        if not name.startswith("fastadv_adapters.") and not set(name.split(".")) <= known:
            yield name


def missing_from(text: str, folder: Path) -> list[str]:
    found = [*missing_paths(text), *missing_files(text, folder), *missing_modules(text), *missing_commands(text)]
    return list(dict.fromkeys(found))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_exists(page: Path) -> None:
    assert missing_from(page.read_text(encoding="utf-8"), page.parent) == []


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_what_a_source_names_exists(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    assert [*missing_from(text, source.parent), *missing_roles(text)] == []


def missing_from_a_wing(docstring: str, files: set[str]) -> list[str]:
    """Single words that the docstring of a wing has in double backticks, and that are none of its files."""
    return [name for name in re.findall(r"``([a-z_]+)``", docstring) if name not in files]


@pytest.mark.parametrize("wing", WINGS, ids=name_of)
def test_what_a_wing_says_of_its_files_exists(wing: Path) -> None:
    docstring = ast.get_docstring(ast.parse((wing / "__init__.py").read_text(encoding="utf-8"))) or ""
    files = {path.stem for path in wing.glob("*.py")}
    assert files & set(re.findall(r"``([a-z_]+)``", docstring)), "a wing says what its files do"
    assert missing_from_a_wing(docstring, files) == []


def test_a_file_that_a_wing_has_lost_is_found() -> None:
    assert missing_from_a_wing("``near`` and ``gone``, as ``torch.func``", {"near"}) == ["gone"]


@pytest.mark.parametrize(
    "text",
    [
        "see `fastadv_adapters/pgd.py`",
        "[here](docs/design.md)",
        "all of `tests/nowhere/*.py`",
        "`pgd_search.py`",
        "`networks.py` of the package, though benchmarks have one",
        "`boundary/boundary.py`",
        "fastadv_adapters.pgd",
        ":func:`~fastadv_adapters.losses.resolve_loss`",
        ":class:`fastadv_adapters.engines.Tape`",
        "python -m benchmarks.shared",
    ],
)
def test_an_old_name_is_found(text: str) -> None:
    assert len(missing_from(text, ROOT / "docs")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "see `fastadv_adapters/attack/search.py` and `tests/attack/`.",
        "[here](docs/guides/options.md#engines)",
        "all of `tests/engines/*.py`",
        "`boundary/function.py`, `model.py`, `options.md`",
        ":func:`~fastadv_adapters.attack.resolve_loss`",
        "fastadv_adapters.boundary.Tape, fastadv_adapters.model.FastAttackModel.view.",
        "`python -m benchmarks.precision`, python -m benchmarks.speed.keeping --quick",
    ],
)
def test_a_name_of_today_is_not(text: str) -> None:
    assert missing_from(text, ROOT / "docs") == []


def test_a_role_refers_to_its_own_file_or_an_import() -> None:
    text = '"""As :func:`there` and :meth:`Kind.run`, not :func:`gone`."""'
    source = f"{text}\nfrom x import there\nclass Kind:\n    def run(self): ...\n"
    assert list(missing_roles(source)) == ["gone"]
