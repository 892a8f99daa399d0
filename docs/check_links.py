"""Every link inside a site leads to a page that is there, and to an anchor on it: `docs/check_links.py FOLDER`."""

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors of a page, and what it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links = {""}, set[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by HTMLParser."""
        found = {name: value for name, value in attrs if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        self.links |= {found[name] for name in ("href", "src") if name in found}


def dead(site: Path) -> Iterator[str]:
    """Links that lead nowhere, as "page: link"; links to other sites are not looked at."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            lost = target in pages and unquote(parts.fragment) not in pages[target].anchors
            if lost or not target.exists():
                yield f"{path.relative_to(site.resolve())}: {link}"


def main() -> None:
    """Print the dead links; the exit status says whether there are any."""
    lines = list(dead(Path(sys.argv[1])))
    print("\n".join(lines) or "no dead link")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
