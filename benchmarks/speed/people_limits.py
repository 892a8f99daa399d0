"""What must hold for the models that people have, held against what was measured, with the reason for what is short."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.shared.report import Table
from benchmarks.speed.limits import Limit, least, most

NEVER_SLOWER = 0.95
WITH_BATCH_NORM = 1.15
MOST_ADDED = 0.1
"""Milliseconds that a step of a network without work may take more."""

GRADIENT = {
    "MLP 784-512-512-10": 1.3,
    "digits net, width 16": 1.05,
    "digits net, width 32": 1.3,
    "LeNet": 1.8,
    "ViT of 4 layers of width 64": 1.25,
    "mobilenetv3_small_050": 1.15,
    "mobilenetv2_100": 1.8,
    "mnasnet_small": 1.3,
    "efficientnet_b0": 1.6,
    "convnext_atto": 1.2,
    "vit_tiny_patch16_224": 1.4,
    "vit_small_patch16_224": 2.3,
    "convnext_tiny": 1.5,
}
"""How many times as fast a gradient pass has to be by default options, with bfloat16 in hardware."""
FLOAT32 = {"efficientnet_b0": 1.3}
"""Likewise in float32, where others are not to be slower."""
NORMALISED = ("digits net", "mobilenet", "mnasnet", "efficientnet")
"""Networks with batch norm."""

FIXED = "the fixed cost of a step"
DEPTHWISE = "depthwise convolutions gain little from 16 bits, and each layer has a fixed cost"
TRANSFORMER = "attention, GELU and norms gain nothing from 16 bits (see the kinds of layers)"
WHY = {
    "LeNet": f"max pooling, which gains nothing from 16 bits, and {FIXED}",
    "ViT of 4 layers of width 64": (
        "products of width 64 are so small that casts to 16 bits and norms use up their gain"
    ),
    "mobilenetv3_small_050": DEPTHWISE,
    "mobilenetv2_100": f"with random weights, an audit may find bfloat16 too coarse and take float32; else {DEPTHWISE}",
    "mnasnet_small": DEPTHWISE,
    "efficientnet_b0": DEPTHWISE,
    "vit_tiny_patch16_224": TRANSFORMER,
    "vit_small_patch16_224": TRANSFORMER,
    "convnext_atto": "depthwise 7x7 convolutions and norms gain nothing from 16 bits (see the kinds of layers)",
}


def must_hold(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line per aim."""
    lines: list[tuple[str, ...]] = []
    for name, row in rows.items():
        for limit, why in _limits(name.split(", batch")[0].removesuffix(", 96").removesuffix(", 224"), row):
            lines.append((name, limit.what, limit.needed, limit.found, limit.word, "" if limit.holds else why))
    columns = ("model", "what", "aim", "measured", "outcome", "if missed, because of")
    note = (
        "Aims of this project on a quiet processor with bfloat16 in hardware. The fixed cost of a step is Python: the "
        "look at every tensor and attribute for changes, the arguments, one autograd Function and, without gradient, "
        "the [look for near ties](../how-it-works.md#passes-without-gradient). The kinds of layers are measured by "
        "`python -m benchmarks.speed.layers`."
    )
    return Table("Aims", columns, lines, note)


def _limits(model: str, row: Mapping[str, Any]) -> Iterator[tuple[Limit, str]]:
    why = WHY.get(model, FIXED)
    if model in GRADIENT:
        yield least("gradient pass", row["ratio"]["default"], GRADIENT[model], _times), why
        yield least("in float32", row["ratio"]["float32"], FLOAT32.get(model, NEVER_SLOWER), _times), why
    else:
        added = row["milliseconds"]["default"] - row["milliseconds"]["plain"]
        yield most("gradient pass, added", added, MOST_ADDED, _milliseconds), why
    needed = WITH_BATCH_NORM if model.startswith(NORMALISED) else NEVER_SLOWER
    yield least("without gradient", row["forward"], needed, _times), FIXED


def _times(value: float) -> str:
    return f"{value:.3f}x"


def _milliseconds(value: float) -> str:
    return f"{value:.2f} ms"
