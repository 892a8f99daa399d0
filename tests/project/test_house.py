"""The tests about the tests: each asserts something, and whatever is skipped says why."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = {path.relative_to(TESTS).as_posix(): path.read_text() for path in sorted(TESTS.rglob("*.py"))}

CHECKS = ("pytest.raises", "pytest.warns", "torch.testing.assert_close", "gradcheck", "gradgradcheck")
LEFT_OUT = ("skip", "skipif", "xfail")

Helper = tuple[str, str]
"""File and name; names of methods begin with a dot, for of whose class a called one is, is not known."""


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """All functions of a file but those inside others, with their names."""
    for part in ast.iter_child_nodes(tree):
        if isinstance(part, ast.FunctionDef):
            yield owner + part.name, part
        else:
            yield from functions(part, "." if isinstance(part, ast.ClassDef) else owner)


def imports(tree: ast.AST) -> dict[str, Helper]:
    """What a file has from other files of the tests."""
    return {
        name.asname or name.name: (line.module.removeprefix("tests.").replace(".", "/") + ".py", name.name)
        for line in ast.walk(tree)
        if isinstance(line, ast.ImportFrom) and line.module and line.module.startswith("tests.")
        for name in line.names
    }


def checks_itself(function: ast.FunctionDef, calls: set[str]) -> bool:
    """Whether there is an assertion in it."""
    if any(isinstance(part, ast.Assert) for part in ast.walk(function)):
        return True
    return any(f".{call}".endswith(tuple(f".{check}" for check in CHECKS)) for call in calls)


def helpers_among(calls: set[str], path: str, known: dict[str, Helper]) -> set[Helper]:
    """The functions of the tests that these may be calls of."""
    files = {path, *(file for file, _ in known.values())}
    found = set[Helper]()
    for call in calls:
        _, dot, name = call.rpartition(".")
        found |= {(file, f".{name}") for file in files} if dot else {known.get(name, (path, name))}
    return found


def without_an_assertion(files: dict[str, str]) -> list[str]:
    """Test functions that check nothing, neither themselves nor by a helper, which may have helpers of its own."""
    found = []
    for path, source in files.items():
        tree = ast.parse(source)
        known = imports(tree)
        for name, function in functions(tree):
            calls = {ast.unparse(part.func) for part in ast.walk(function) if isinstance(part, ast.Call)}
            found.append(((path, name), checks_itself(function, calls), helpers_among(calls, path, known)))
    checked = {helper for helper, itself, _ in found if itself}
    while more := {helper for helper, _, others in found if others & checked} - checked:
        checked |= more
    bare = [(path, name.lstrip(".")) for (path, name), itself, others in found if not itself and not others & checked]
    return [f"{path}: {name}" for path, name in bare if name.startswith("test_")]


def without_a_reason(files: dict[str, str]) -> list[str]:
    """Skips and expected failures that do not say why; a reason stands where the skip stands, as text."""
    return [
        f"{path}:{part.lineno}: {ast.unparse(part)}"
        for path, source in files.items()
        for part in unexplained(ast.parse(source))
    ]


def unexplained(tree: ast.AST) -> Iterator[ast.Attribute]:
    explained = {id(part.func) for part in ast.walk(tree) if isinstance(part, ast.Call) and has_reason(part)}
    for part in (part for part in ast.walk(tree) if id(part) not in explained):
        if isinstance(part, ast.Attribute) and part.attr in LEFT_OUT and ast.unparse(part).startswith("pytest."):
            yield part


def has_reason(call: ast.Call) -> bool:
    # `skipif` and the mark `xfail` take conditions first, `skip` and the function `xfail` a reason.
    conditional = ast.unparse(call.func).endswith(("skipif", "mark.xfail"))
    given = [] if conditional else call.args[:1]
    given += [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
    return any(not isinstance(text, ast.Constant) or bool(str(text.value or "").strip()) for text in given)


def test_every_test_asserts_something() -> None:
    assert without_an_assertion(FILES) == []


def test_every_skip_says_why() -> None:
    assert without_a_reason(FILES) == []


def test_the_command_for_gpus_names_the_files_that_need_one() -> None:
    mark = "pytest.mark." + "cuda"  # in two parts: this file has no such test
    line = subprocess.run(["make", "-n", "test-gpu"], cwd=TESTS.parent, check=True, capture_output=True, text=True)
    named = {word for word in line.stdout.split() if word.endswith(".py")}
    assert named == {f"tests/{path}" for path, source in FILES.items() if mark in source}
    assert "tests/gpu/test_cuda.py" in named


# --- the checkers -----------------------------------------------------------------------------------------------------


BARE = {
    "nothing": "def test_it(): run()",
    "a value": "def test_it(): run() is not None",
    "a helper without one": "def helper(): run()\ndef test_it(): helper()",
    "helpers in a circle": "def helper(): other()\ndef other(): helper()\ndef test_it(): helper()",
    "only in another test": "def test_other(): assert run()\ndef test_it(): run()",
    "a name that only ends like one": "def test_it(): not_gradcheck(run)",
    "a method of that name": "class Other:\n    def run(self): assert x\ndef test_it(): run()",
    "other contexts": "def test_it():\n    with torch.no_grad(): run()",
    "in a class": "class TestAll:\n    def test_it(self): run()",
    "one of two of a name": "class A:\n    def test_it(self): assert 1\nclass B:\n    def test_it(self): run()",
    "a skip": "def test_it(): pytest.skip('later')",
}
CHECKED = {
    "assert": "def test_it(): assert run()",
    "raises": "def test_it():\n    with pytest.raises(ValueError, match='x'): run()",
    "warns": "def test_it():\n    with pytest.warns(UserWarning): run()",
    "close": "def test_it(): torch.testing.assert_close(run(), 1)",
    "gradcheck": "def test_it(): gradcheck(run, x)",
    "gradcheck by its path": "def test_it(): torch.autograd.gradcheck(run, x)",
    "a function inside": "def test_it():\n    def check(x): assert x\n    run(check)",
    "a helper": "def helper(): assert run()\ndef test_it(): helper()",
    "a helper's helper": "def inner(): assert run()\ndef helper(): inner()\ndef test_it(): helper()",
    "a method": "class Problem:\n    def same(self): assert run()\ndef test_it(problem): problem.same()",
    "no test": "def helper(): run()",
}


@pytest.mark.parametrize("name", BARE)
def test_a_test_that_checks_nothing_is_found(name: str) -> None:
    assert without_an_assertion({"test_a.py": BARE[name]}) == ["test_a.py: test_it"]


@pytest.mark.parametrize("name", CHECKED)
def test_a_test_that_checks_something_is_not(name: str) -> None:
    assert without_an_assertion({"test_a.py": CHECKED[name]}) == []


def test_a_helper_of_another_file_counts_where_it_is_imported() -> None:
    tools = {"zoo/tools.py": "def same(): assert run()\nclass Kept:\n    def check(self): assert run()"}
    function = "from tests.zoo.tools import same as alike\ndef test_it(): alike()"
    method = "from tests.zoo.tools import Kept\ndef test_it(): Kept().check()"
    assert without_an_assertion({**tools, "test_a.py": function, "test_b.py": method}) == []
    assert without_an_assertion({**tools, "test_a.py": "def test_it(): same()"}) == ["test_a.py: test_it"]
    assert without_an_assertion({**tools, "test_a.py": "def test_it(kept): kept.check()"}) == ["test_a.py: test_it"]


SILENT = [
    "pytest.skip()",
    "pytest.skip('')",
    "pytest.skip(' ')",
    "pytest.xfail()",
    "pytest.xfail(reason='')",
    "mark = pytest.mark.skip",
    "mark = pytest.mark.skip()",
    "mark = pytest.mark.skip(reason='')",
    "mark = pytest.mark.skipif(True)",
    "mark = pytest.mark.skipif(True, reason='')",
    "mark = pytest.mark.skipif('os.name == 1')",
    "mark = pytest.mark.xfail('os.name == 1', strict=True)",
    "@pytest.mark.xfail\ndef test_it(): assert run()",
]
EXPLAINED = [
    "pytest.skip('no device')",
    "pytest.skip(f'no {device}')",
    "pytest.xfail(reason='known')",
    "mark = pytest.mark.skip(reason='no device')",
    "mark = pytest.mark.skipif(True, reason='no device')",
    "@pytest.mark.xfail(reason='known')\ndef test_it(): assert run()",
    "batches.skip()",
]


@pytest.mark.parametrize("source", SILENT)
def test_a_skip_without_a_reason_is_found(source: str) -> None:
    assert len(without_a_reason({"test_a.py": source})) == 1


@pytest.mark.parametrize("source", EXPLAINED)
def test_a_skip_with_a_reason_is_not(source: str) -> None:
    assert without_a_reason({"test_a.py": source}) == []
