"""Put the tables that the commands have written into the pages of the docs, between their comments.

Run with `python -m benchmarks.quote`, after whichever of them has run anew.
"""

import os
import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shared.report import OUT

ROOT = OUT.parent.parent
WIDTH = 120
_NO_PROSE = ("|", "- ", "![", "**")  # what is not wrapped begins so


@dataclass(frozen=True)
class Quotation:
    """What of a page of results is quoted.

    Attributes:
        source: name of the page.
        sections: patterns of the beginnings of the headings of what is quoted; all if there are none.
        head: whether what stands above the first section is quoted too: device, versions, settings, a picture.
    """

    source: str
    sections: tuple[str, ...] = ()
    head: bool = True


QUOTED: dict[str, dict[str, Quotation]] = {
    "docs/start.md": {"demo": Quotation("demo")},
    "docs/trust/half-precision.md": {"precision": Quotation("precision", ("digits network",))},
}
"""Page to what stands in it, by the name in its comment."""


def without_title(text: str) -> str:
    """A page of results below its title, with its headings in bold, to stand in another page."""
    body = text.split("\n", 1)[1] if text.startswith("# ") else text
    return re.sub(r"^#+ (.*)$", r"**\1**", body, flags=re.MULTILINE).strip()


def excerpt(page: str, wanted: Quotation) -> str:
    """Of a page of results, the part that is wanted, to stand in another page, with its paragraphs wrapped."""
    head, *sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    pattern = re.compile("|".join(wanted.sections))
    chosen = [part for part in sections if pattern.match(part[3:])]
    parts = without_title("".join([head, *chosen] if wanted.head else chosen)).split("\n\n")
    return "\n\n".join(part if part.startswith(_NO_PROSE) else _wrapped(part) for part in parts)


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(" ".join(paragraph.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def quote(page: str, name: str, table: str) -> str:
    """The page with `table` between the comments for `name`.

    Raises:
        ValueError: it has no such comments.
    """
    place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end table -->)", flags=re.DOTALL)
    if not place.search(page):
        raise ValueError(f"expected <!-- table: {name} --> in the page, got none: put it back")
    return place.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page)


def _from(folder: Path, text: str) -> str:
    """Links to what lies beside the results, and above them, as they lead there from another folder."""

    def way(found: re.Match[str]) -> str:
        return f"]({Path(os.path.relpath(OUT / found[1], folder)).as_posix()})"

    return re.sub(r"\]\(([\w-]+\.png|\.\./[^)]+)\)", way, text)


def main() -> None:
    """Quote every table that exists."""
    if (ROOT / "demo.md").exists():
        shutil.copy(ROOT / "demo.md", OUT / "demo.md")
    for target, tables in QUOTED.items():
        path = ROOT / target
        text = path.read_text(encoding="utf-8")
        for name, wanted in tables.items():
            source = OUT / f"{wanted.source}.md"
            if source.exists():
                table = excerpt(source.read_text(encoding="utf-8"), wanted)
                text = quote(text, name, _from(path.parent, table))
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
