"""The benchmark scripts run, at sizes that measure nothing, and write what they say they write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.quote import quote

ROOT = Path(__file__).parent.parent
SMALL = {
    "speed": "--width 8 --batch 4 --steps 2 --repeats 2 --wide-depth 10 --wide-width 2 "
    "--update-repeats 3 --matrix-size 64",
    "precision": "--images 8 --steps 2 --epochs 1 --resnet-images 0",
}


@pytest.mark.parametrize("name", SMALL)
def test_the_script_runs_and_writes_its_results(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALL[name].split(), "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    results = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert results["results"]
    assert results["versions"]
    page = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert f"python -m benchmarks.{name}" in page
    assert "| way |" in page


def test_quoting_replaces_what_stood_there() -> None:
    page = "a\n<!-- table: demo -->\nold\n<!-- end table -->\nb"
    assert quote(page, "demo", "new") == "a\n<!-- table: demo -->\n\nnew\n\n<!-- end table -->\nb"
    with pytest.raises(ValueError, match="expected <!-- table: other -->"):
        quote(page, "other", "new")
