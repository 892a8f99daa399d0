"""The package stays readable: no long file, no long function, few files at the top."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "fastadv_adapters"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}

LINES_OF_A_FILE = 300
LINES_OF_A_FUNCTION = 60
FILES_AT_THE_TOP = 8


def long_files(sources: dict[str, str]) -> list[str]:
    lengths = {name: len(source.splitlines()) for name, source in sources.items()}
    return [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > LINES_OF_A_FILE]


def long_functions(sources: dict[str, str]) -> list[str]:
    """Functions and methods, counted from `def`, or from the first decorator, to the last line."""
    found = []
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lines = (node.end_lineno or begin) - begin + 1
                if lines > LINES_OF_A_FUNCTION:
                    found.append(f"{name}: {node.name} has {lines} lines")
    return found


def test_no_file_is_long() -> None:
    assert len(SOURCES) > 40, "the search should find the package"
    assert long_files(SOURCES) == []


def test_no_function_is_long() -> None:
    assert long_functions(SOURCES) == []


def test_few_files_stand_at_the_top() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()} - {"__init__.py", "py.typed"}
    assert "model.py" in files
    assert len(files) <= FILES_AT_THE_TOP, f"{sorted(files)}: a new file belongs in a wing"


def test_what_is_long_is_found() -> None:
    longest = "def longest():\n" + "    pass\n" * (LINES_OF_A_FUNCTION - 1)
    method = "class Kind:\n    @property\n    def long(self):\n" + "        pass\n" * (LINES_OF_A_FUNCTION - 1)
    assert long_functions({"a.py": longest, "b.py": method}) == [f"b.py: long has {LINES_OF_A_FUNCTION + 1} lines"]
    sources = {"a.py": "\n" * LINES_OF_A_FILE, "b.py": "\n" * (LINES_OF_A_FILE + 1)}
    assert long_files(sources) == [f"b.py: {LINES_OF_A_FILE + 1} lines"]
