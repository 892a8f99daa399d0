"""What has been found so far, in a file: a run that was stopped goes on from there."""

import json
from pathlib import Path

CACHE = Path("build/attack")
"""Folder for networks and results unless told otherwise."""


class Kept:
    """Cells by key in a JSON file, written after every cell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, dict[str, object]] = json.loads(path.read_text()) if path.exists() else {}

    def put(self, key: str, cell: dict[str, object]) -> None:
        """Keep a cell; a file that is half written is never seen."""
        self.cells[key] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.cells, indent=1))
        beside.replace(self.path)
