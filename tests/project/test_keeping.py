"""The benchmark of what is kept for the backward pass, at a size that measures no time, and what the docs say of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import keeping

pytestmark = pytest.mark.long


@pytest.fixture(params=["float32", "bfloat16"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    threads = torch.get_num_threads()
    keeping.main(width=8, batch=2, repeats=1, warmup=0, dtype=request.param, threads=threads, out=tmp_path)
    page = (tmp_path / f"keeping-{request.param}.md").read_text(encoding="utf-8")
    assert f"python -m benchmarks.speed.keeping --dtype {request.param}" in page
    record = json.loads((tmp_path / f"keeping-{request.param}.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = record["results"] | {"bytes in an entry": 4 if request.param == "float32" else 2}
    return found


def test_ways_of_keeping(results: dict[str, Any]) -> None:
    size = results.pop("bytes in an entry")
    for ways in results.values():
        assert [name for name, way in ways.items() if not way["same"]] == [keeping.PLAIN]
    relu, silu, leaky = ({name: way["bytes"] for name, way in ways.items()} for ways in results.values())
    assert relu[keeping.OURS] <= relu[keeping.PLAIN] * 0.5 * size / 4
    assert relu[keeping.IN_PLACE] == relu[keeping.ATEN]
    assert relu[keeping.MASK] == relu[keeping.OURS] / size
    assert silu[keeping.OURS] <= 0.5 * silu[keeping.ATEN]
    assert leaky[keeping.OURS] <= 0.5 * leaky[keeping.ATEN]
    assert leaky[keeping.SHAPES] == leaky[keeping.OURS] <= leaky[keeping.IN_PLACE]
