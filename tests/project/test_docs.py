"""The documentation agrees with the code: anchors, links, quoted errors, and the code of the guide."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "fastadv_adapters").rglob("*.py"))
RELIABILITY = ROOT / "docs" / "reliability.md"
ANCHOR = re.compile(r"[a-z]+(-[a-z]+)+")
ERROR = re.compile(r'<a id="(error(?:-[a-z]+)+)"></a>`([^`]+)`')
COLUMNS = ["text begins with", "raised if", "why", "what to do"]
FAULTS = {  # that the table has to cover -> how its row begins
    "overflow in the forward pass": "an overflow inside the forward pass",
    "overflow in the backward pass": "an overflow in the backward pass",
    "NaN weights": "NaN weights when the model is wrapped",
    "NaN weights later": "weights that become NaN or infinite later",
    "NaN pixels": "NaN pixels",
    "a layer that returns NaN for one sample": "a layer that returns NaN or infinity for one sample",
    "out of memory": "out of memory raised by the network",
    "a change of structure": "the model changes structure under the wrapper",
    "a change of device": "a device change",
    "an optimizer step in between": "an optimizer step between forward and backward",
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> list[str]:
    """What GitHub makes of a page's headings, and those that are written out."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    made = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return made + re.findall(r'<a id="([^"]+)"></a>', prose(page))


def text_of(node: ast.expr) -> str:
    """A text in the source, with an ellipsis for whatever is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return "…"


def nodes(source: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(source.read_text(encoding="utf-8")))


def notified() -> set[str]:
    """The anchors of all warnings: the last of a call of notify, or of the pair that is handed to it later."""
    found = set()
    for source in SOURCES:
        calls = [n for n in nodes(source) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("notify")]
        pairs = [n.elts for n in nodes(source) if isinstance(n, ast.Tuple) and len(n.elts) == 2] if calls else []
        for arguments in (*(call.args for call in calls), *pairs):
            if ANCHOR.fullmatch(text_of(arguments[-1])):
                found.add(text_of(arguments[-1]))
    return found


def raised() -> Iterator[str]:
    """The text of every error that the package raises, but for one without a text, which is caught again."""
    for source in SOURCES:
        for node in nodes(source):
            first = node.exc.args[:1] if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else []
            yield from (text_of(argument) for argument in first if not isinstance(argument, ast.Starred))


def tables(begin: str, end: str) -> list[list[list[str]]]:
    """The cells of each row of each table between two sections; the first row is the head."""
    text = prose(RELIABILITY)
    found = re.findall(r"(?:^\|.*\n)+", text[text.index(f"\n## {begin}\n") : text.index(f"\n## {end}\n")], re.MULTILINE)
    split = [[[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()] for table in found]
    return [[head, *rows] for head, _, *rows in split]


def error_rows() -> list[list[str]]:
    return [row for _, *rows in tables("Errors", "Reasons in the summary") for row in rows]


def fault_rows() -> list[list[str]]:
    return [row for _, *rows in tables("Faults", "Known limits") for row in rows]


def says_nothing(cell: str) -> bool:
    """Whether a cell is empty, or leaves it to the row above."""
    return not re.search(r"\w", cell) or cell.lower().startswith(("likewise", "ditto", "same", "as above"))


def quoted() -> list[str]:
    """The texts in the first column of the tables of errors and reasons."""
    cells = [row[0] for _, *rows in tables("Errors", "What cannot be noticed") for row in rows]
    texts = [re.fullmatch(r"(?:<a [^>]+></a>)?`([^`]+)`", cell) for cell in cells]
    return [text[1].removesuffix("…").rstrip() for text in texts if text]


def test_every_warning_has_its_section_and_every_section_its_warning() -> None:
    text = RELIABILITY.read_text(encoding="utf-8")
    sections = text[text.index("\n## Warnings") : text.index("\n## Errors")]
    assert len(notified()) >= 5, "the search should find the warnings"
    assert set(re.findall(r"^### (.+)$", sections, re.MULTILINE)) == notified()
    assert notified() <= set(anchors(RELIABILITY))


def test_every_error_is_in_the_tables() -> None:
    beginnings = tuple(quoted())
    assert [text for text in raised() if not text.startswith(beginnings)] == []


def test_every_error_has_an_anchor_of_its_own() -> None:
    rows = error_rows()
    assert len(rows) > 55, "the search should find the tables"
    assert [row[0] for row in rows if not ERROR.fullmatch(row[0])] == []
    ids = [match[1] for row in rows if (match := ERROR.fullmatch(row[0]))]
    assert [anchor for anchor in ids if anchors(RELIABILITY).count(anchor) != 1] == []


def test_every_error_says_when_it_is_raised_and_why_and_what_to_do() -> None:
    heads = [head for head, *_ in tables("Errors", "Reasons in the summary")]
    assert heads == [COLUMNS] * len(heads)
    assert [row for row in error_rows() if len(row) != len(COLUMNS) or any(map(says_nothing, row))] == []


def test_every_fault_says_what_happens_and_which_test_shows_it() -> None:
    """That the tests exist is looked at in test_faults.py."""
    rows = fault_rows()
    assert len(rows) > 25, "the search should find the tables"
    assert [row for row in rows if len(row) != 3 or any(map(says_nothing, row))] == []
    assert [row[0] for row in rows if not re.search(r"\[`test_\w+`\]\(\.\./tests/\w+/test_\w+\.py\)", row[2])] == []


@pytest.mark.parametrize("begins", FAULTS.values(), ids=FAULTS.keys())
def test_the_table_of_faults_has(begins: str) -> None:
    assert len([row for row in fault_rows() if row[0].startswith(begins)]) == 1


def test_every_quoted_text_is_in_the_code() -> None:
    texts = [text_of(n) for source in SOURCES for n in nodes(source) if isinstance(n, (ast.JoinedStr, ast.Constant))]
    assert len(quoted()) > 50, "the search should find the tables"
    assert [beginning for beginning in quoted() if not any(beginning in text for text in texts)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_headings_are_different_and_links_lead_somewhere(page: Path) -> None:
    assert len(set(anchors(page))) == len(anchors(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{target} does not exist"
        assert other.is_relative_to(ROOT), f"{target} is outside the project"
        assert not anchor or anchor in anchors(other), f"{target} has no such anchor"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name not in index and page.name != "README.md"
    ] == []


def test_the_readme_has_its_tables() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = re.findall(r"<!-- table: (\w+) -->.*?<!-- end table -->", text, re.DOTALL)
    assert marked == ["demo", "bench", "precision"]


def test_guide_code_runs() -> None:
    """The blocks share one namespace, in order."""
    text = (ROOT / "docs" / "guides" / "options.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 10, "the guide should show code"
    for block in blocks:
        line = text.count("\n", 0, block.start(1))  # so that a traceback names the guide's own line
        exec(compile("\n" * line + block[1], "docs/guides/options.md", "exec"), namespace)
