"""Settings of Sphinx for `make docs`: strict, and without the network."""

import re
import sys
import zlib
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import fastadv_adapters  # noqa: E402  # from the folder above

project = "fastadv_adapters"
author = "The fastadv_adapters developers"
copyright = author
release = version = fastadv_adapters.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "index"
exclude_patterns = ["benchmarks/demo.md"]  # a table alone, to be quoted
html_theme = "furo"
html_title = f"fastadv_adapters {release}"
html_copy_source = False

myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 4  # the same anchors as GitHub's
suppress_warnings = ["myst.header"]  # pages that commands write begin some sections two levels down

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

autodoc_mock_imports = ["torchmetrics"]  # not everybody has it, and one name alone needs it

nitpicky = True
nitpick_ignore_regex = [
    (r"py:class", r".*\.(Attack|Adversary)T"),  # type variables: the type that comes in
    (r"py:class", r"fastadv_adapters\.boundary\.watching\.Watch"),  # described where it is handed out
]


def inventories(to: Path) -> dict[str, tuple[str, str]]:
    """What intersphinx would fetch, from the names in ``docs/inventory.txt`` alone: nothing is downloaded."""
    mapping: dict[str, tuple[str, str]] = {}
    for part in re.split(r"^# ", (HERE / "inventory.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        (name, address), *entries = [line.split() for line in part.splitlines() if line.strip()]
        lines = [f"{target} {role} 1 {place} -\n" for target, role, place in entries]
        head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# compressed by zlib\n"
        path = to / f"{name}.inv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(head.encode() + zlib.compress("".join(lines).encode()))
        mapping[name] = (address, str(path))
    return mapping


intersphinx_mapping = inventories(ROOT / "build" / "inventories")


def anchors(app: Sphinx, name: str, source: list[str]) -> None:
    """Anchors that GitHub wants written in HTML, as MyST wants them; what lies above the docs is a page of the site."""
    text = re.sub(r'<a id="([\w-]+)"></a>', r"[]{#\1}", source[0])
    source[0] = re.sub(r"\]\(((?:\.\./)*)\.\./CONTRIBUTING\.md\b", r"](\1contributing.md", text)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", anchors)
