"""The ways to attack in half precision that are compared, with the plain one first."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.shared.rows import FIXED_SCALE, Prepared, Row, Setup, ours, recipe, torchattacks_pgd


def ways() -> tuple[Row, ...]:
    """The ways that are compared."""
    half = torch.float16
    builds: dict[str, Callable[[nn.Module, Setup], Prepared]] = {
        "plain float32": torchattacks_pgd,
        "fast float16": partial(ours, dtype=half),
        "fast bfloat16": partial(ours, dtype=torch.bfloat16),
        "fast float16, float64 logits": partial(ours, dtype=half, logits_dtype=torch.float64),
        "recipe float16": partial(recipe, dtype=half),
        "recipe float16, loss scale 2^16": partial(recipe, dtype=half, loss_scale=FIXED_SCALE),
    }
    return tuple(Row(label, label, half, build) for label, build in builds.items())
