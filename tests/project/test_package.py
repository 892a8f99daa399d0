"""What stands around the package agrees with it: versions, extras, workflows, hooks."""

import re
from pathlib import Path

import yaml

import fastadv_adapters

ROOT = Path(__file__).resolve().parents[2]
VERSION = fastadv_adapters.__version__
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(name: str) -> set[str]:
    return {canonical(line.split("==")[0]) for line in read(name).splitlines() if "==" in line}


def extras() -> dict[str, list[str]]:
    """The packages that each extra names, but for the package's own extras."""
    text = PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
    found = re.findall(r"^(\w+) = \[(.*?)\](?=\s*(?:#|$|\n\w))", text, re.MULTILINE | re.DOTALL)
    quoted = {extra: re.findall(r'"([A-Za-z][\w.-]*)(\[[^"]*)?[^"]*"', body) for extra, body in found}
    return {extra: [canonical(n) for n, inner in names if not inner] for extra, names in quoted.items()}


def test_the_version_is_the_same_everywhere() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] == VERSION
    latest = re.search(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"), re.MULTILINE)
    assert latest is not None
    assert latest[1] == VERSION


def test_what_extras_name_is_pinned() -> None:
    found = extras()
    assert {"torchattacks", "foolbox", "docs", "dev"} <= found.keys()
    assert found["foolbox"] == ["foolbox", "eagerpy", "numba"]
    assert set(found.pop("docs")) <= pinned("docs/constraints.txt")
    assert {name for names in found.values() for name in names} <= pinned("constraints.txt")


def test_workflows_and_hooks_run_what_there_is() -> None:
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    called = set[str]()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            called |= {made[1] for step in job["steps"] if (made := re.match(r"make ([\w-]+)", step.get("run", "")))}
    assert {"test", "test-versions", "docs", "dist"} <= called <= targets
    hooks = [
        hook["entry"] for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]
    ]
    lint = read("Makefile").split("\nlint: ")[1].split("\n\n")[0].replace("$(BIN)", ".venv/bin")
    assert all(hook in lint for hook in hooks), "hooks run what make lint runs, from the same environment"
