"""The documentation agrees with the code: anchors, links, quoted errors, and the names that the reference has."""

import ast
import importlib
import inspect
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "fastadv_adapters").rglob("*.py"))
RELIABILITY = ROOT / "docs" / "reliability.md"
ERRORS = ROOT / "docs" / "errors.md"
FAULTS_PAGE = ROOT / "docs" / "faults.md"
ANCHOR = re.compile(r"[a-z]+(-[a-z]+)+")
ERROR = re.compile(r'<a id="(error(?:-[a-z]+)+)"></a>`([^`]+)`')
MADE = "bench", "bench-avx2", "precision"
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
    """The anchors of all warnings: the last of a call of notify, or of the pair that ``said`` hands to it later."""
    found = set()
    for source in SOURCES:
        called = [n for n in nodes(source) if isinstance(n, ast.Call) and n.args]
        calls = [n for n in called if ast.unparse(n.func).endswith(("notify", ".say"))]
        says = calls or any(isinstance(n, ast.FunctionDef) and n.name == "said" for n in nodes(source))
        pairs = [n.elts for n in nodes(source) if isinstance(n, ast.Tuple) and len(n.elts) == 2] if says else []
        for arguments in (*(call.args for call in calls), *pairs):
            last = arguments[-1]
            for branch in (last.body, last.orelse) if isinstance(last, ast.IfExp) else (last,):
                if ANCHOR.fullmatch(text_of(branch)):
                    found.add(text_of(branch))
    return found


def raised() -> Iterator[str]:
    """The text of every error that the package raises, but for one without a text, which is caught again."""
    for source in SOURCES:
        for node in nodes(source):
            first = node.exc.args[:1] if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else []
            yield from (text_of(argument) for argument in first if not isinstance(argument, ast.Starred))


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each row of each table; the first row is the head."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    split = [[[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()] for table in found]
    return [[head, *rows] for head, _, *rows in split]


def section(page: Path, begin: str) -> str:
    """A page from one heading to the next of its kind."""
    return re.split(r"^## ", prose(page).split(f"\n## {begin}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def error_rows() -> list[list[str]]:
    return [row for _, *rows in tables(prose(ERRORS)) for row in rows]


def fault_rows() -> list[list[str]]:
    return [row for _, *rows in tables(prose(FAULTS_PAGE)) for row in rows]


def says_nothing(cell: str) -> bool:
    """Whether a cell is empty, or leaves it to the row above."""
    return not re.search(r"\w", cell) or cell.lower().startswith(("likewise", "ditto", "same", "as above"))


def quoted() -> list[str]:
    """The texts in the first column of the tables of errors and reasons."""
    reasons = tables(section(RELIABILITY, "Reasons in the summary"))
    cells = [row[0] for _, *rows in (*tables(prose(ERRORS)), *reasons) for row in rows]
    texts = [re.fullmatch(r"(?:<a [^>]+></a>)?`([^`]+)`", cell) for cell in cells]
    return [text[1].removesuffix("…").rstrip() for text in texts if text]


def test_every_warning_has_its_section_and_every_section_its_warning() -> None:
    sections = section(RELIABILITY, "Warnings")
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
    assert [anchor for anchor in ids if anchors(ERRORS).count(anchor) != 1] == []


def test_every_error_says_when_it_is_raised_and_why_and_what_to_do() -> None:
    heads = [head for head, *_ in tables(prose(ERRORS))]
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


def toctree_of(page: Path) -> list[Path]:
    """The pages below a page, as Sphinx finds them."""
    blocks = re.findall(r"^```{toctree}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found: list[Path] = []
    lines = (line for block in blocks for line in block.splitlines() if line and not line.startswith(":"))
    for entry in (re.sub(r".* <(.+)>", r"\1", line) for line in lines):
        found += (
            sorted(page.parent.glob("*.md"))
            if entry == "*"
            else [(page.parent / f"{entry.removesuffix('.md')}.md").resolve()]
        )
    return found


def test_every_page_is_in_a_toctree() -> None:
    """Once, and what is named there exists: but for the table alone that docs/conf.py leaves out."""
    docs = ROOT / "docs"
    listed = [page for index in docs.rglob("*.md") for page in toctree_of(index) if page != index]
    left_out = {docs / "index.md", docs / "benchmarks" / "demo.md"}
    assert sorted(set(listed) - left_out) == sorted(set(docs.rglob("*.md")) - left_out)
    assert len(set(listed)) == len(listed)


def test_every_recipe_is_on_its_page() -> None:
    page = (ROOT / "docs" / "guides" / "recipes.md").read_text(encoding="utf-8")
    names = {path.name for path in (ROOT / "examples" / "recipes").glob("*.py")} - {"common.py"}
    assert set(re.findall(r"/recipes/(\w+\.py)\)", page)) == names


WHOLE = ("", ".evaluation")
"""What these export is public, one and all; other modules hand out more to their neighbours than is promised."""

PUBLIC = (*WHOLE, ".comparison", ".torchattacks", ".foolbox", ".autoattack", ".attack")


def documented(name: str) -> list[str]:
    """What the page of a public module documents."""
    page = ROOT / "docs" / "reference" / f"{name.removeprefix('.') or 'core'}.md"
    text = page.read_text(encoding="utf-8")
    assert f".. currentmodule:: fastadv_adapters{name}\n" in text
    return re.findall(r"^\.\. auto(?:class|function|data|exception):: ([\w.]+)", text, re.MULTILINE)


@pytest.mark.parametrize("name", WHOLE)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    exported = set(importlib.import_module(f"fastadv_adapters{name}").__all__)
    elsewhere = {*documented(".evaluation"), *documented(".comparison")} if name == "" else set()
    assert exported - elsewhere == {entry for entry in documented(name) if "." not in entry} - elsewhere


@pytest.mark.parametrize("name", PUBLIC)
def test_what_the_reference_has_exists_and_says_what_it_is(name: str) -> None:
    module = importlib.import_module(f"fastadv_adapters{name}")
    found = {entry: getattr(module, entry) for entry in documented(name) if "." not in entry}
    assert found, "the page should document something"
    kinds = (type, types.FunctionType)
    assert [entry for entry, value in found.items() if isinstance(value, kinds) and not inspect.getdoc(value)] == []


def gains(networks: dict[str, Any], dtype: str, *, foolbox: bool = False) -> str:
    """From the least to the most that residual networks gain."""
    plain, ours = ("foolbox", f"foolbox-ours-{dtype}") if foolbox else ("plain", f"ours-eager-{dtype}")
    found = [rows[plain]["median_s"] / rows[ours]["median_s"] for name, rows in networks.items() if name != "vit"]
    return f"{min(found):.1f} to {max(found):.1f}"


def test_the_table_of_networks_is_measured() -> None:
    """A row for each network, as `make bench` has measured it: milliseconds, and how many times faster than plain."""
    networks = json.loads((ROOT / "docs" / "benchmarks" / "bench.json").read_text())["results"]["networks"]
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    expected = []
    for network in networks.values():
        plain, *others = (
            network["rows"][way]["median_s"]
            for way in ("plain", "autocast-bfloat16", "recipe-bfloat16", "ours-eager-bfloat16")
        )
        cells = [f"{1000 * seconds:.0f} ({plain / seconds:.1f}x)" for seconds in others]
        expected.append(f"| {network['title']} | {1000 * plain:.0f} | {' | '.join(cells)} |")
    head = "| network | plain | autocast | recipe | ours |"
    assert page[page.index(head) :].split("\n\n")[0].splitlines()[2:] == expected


def test_the_figures_of_the_readme_are_measured() -> None:
    """Times and ratios as `make bench` has written them, robust accuracies as `python -m benchmarks.precision` has."""
    read = {name: json.loads((ROOT / "docs" / "benchmarks" / f"{name}.json").read_text())["results"] for name in MADE}
    networks = {name: network["rows"] for name, network in read["bench"]["networks"].items()}
    robust = {way: cell["robust"] for way, cell in read["precision"]["digits network, logits x 2"].items()}
    rows = networks["resnet18"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for before, after in (
        ("plain", "ours-eager-bfloat16"),
        ("foolbox", "foolbox-ours-bfloat16"),
        ("plain", "ours-eager-float32"),
    ):
        slow, fast = rows[before]["median_s"], rows[after]["median_s"]
        assert f"| {1000 * slow:.0f} ms | {1000 * fast:.0f} ms | **{slow / fast:.1f}x** |" in readme
    found = (robust[way] for way in ("plain float32", "fast bfloat16", "fast float16", "recipe float16"))
    assert "| {:.1%} | {:.1%} in bfloat16, {:.1%} in float16 | **{:.1%}, wrong** |".format(*found) in readme
    assert f"up to {rows['foolbox']['median_s'] / rows['foolbox-ours-bfloat16']['median_s']:.1f} times faster" in readme
    assert f"{gains(networks, 'bfloat16')} times faster" in readme
    assert f"{gains(networks, 'float32')} times faster" in readme
    older = {name: network["rows"] for name, network in read["bench-avx2"]["networks"].items()}
    assert f"{gains(older, 'float32')} times faster, {gains(older, 'float32', foolbox=True)} with foolbox" in readme
    assert f"{networks['vit']['ours-eager-bfloat16']['ratio_to_plain']:.1f} times faster in bfloat16" in readme
    slower = older["vit"]["ours-eager-float32"]["ratio_to_plain"]
    assert f"[AMD without AVX512](docs/benchmarks/bench-avx2.md): {slower:.2f} times" in readme


def test_the_strength_of_safepgd_is_measured() -> None:
    """In the guide as in the last column of the table of every cell."""
    page = (ROOT / "docs" / "benchmarks" / "attack-strength.md").read_text(encoding="utf-8")
    head, *rows = tables(page)[-1]
    behind = [float(row[head.index("behind")]) for row in rows]
    ahead = sum(points < 0 for points in behind)
    guide = " ".join((ROOT / "docs" / "guides" / "safepgd.md").read_text(encoding="utf-8").split())
    assert f"in {ahead} of {len(behind)} cells, by {-sum(behind) / len(behind):.1f} points" in guide
    assert f"At worst it was {max(behind):.1f} points behind" in guide
