"""Put the tables that the commands have written into the README, between their comments.

Run with `python -m benchmarks.quote`, after whichever of them has run anew.
"""

import re
import shutil

from benchmarks.report import OUT

README = OUT.parent.parent / "README.md"

QUOTED = {"demo": "", "speed": "", "precision": "## ResNet-18"}
"""Name of a page of results to the heading before which the quotation ends."""


def without_title(text: str) -> str:
    """A page of results below its title, with its headings in bold, to stand in another page."""
    body = text.split("\n", 1)[1] if text.startswith("# ") else text
    return re.sub(r"^#+ (.*)$", r"**\1**", body, flags=re.MULTILINE).strip()


def quote(readme: str, name: str, table: str) -> str:
    """The README with `table` between the comments for `name`."""
    place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end table -->)", flags=re.DOTALL)
    if not place.search(readme):
        raise ValueError(f"expected <!-- table: {name} --> in {README.name}, got none: put it back")
    return place.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", readme)


def main() -> None:
    """Quote every table that exists."""
    if (README.parent / "demo.md").exists():
        shutil.copy(README.parent / "demo.md", OUT / "demo.md")
    text = README.read_text(encoding="utf-8")
    for name, until in QUOTED.items():
        if (OUT / f"{name}.md").exists():
            page = (OUT / f"{name}.md").read_text(encoding="utf-8")
            text = quote(text, name, without_title(page.split(until)[0] if until else page))
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
