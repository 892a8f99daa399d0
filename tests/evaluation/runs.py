"""A network, data and calls of ``evaluate`` that its tests share."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, FastAttackOptions, Report, evaluate
from fastadv_adapters.evaluation import Row
from tests.support.tools import attackable_net, batch

EPS = 0.008
FLOAT32: FastAttackOptions = {"dtype": torch.float32}
ATTACKS = ["safe-pgd-ce-6", "safe-pgd-targeted-2"]


@functools.cache
def net() -> nn.Module:
    """In eval mode."""
    return attackable_net()


def data(samples: int = 32) -> tuple[Tensor, Tensor]:
    """Images and labels, of which every eighth is wrong."""
    x = batch(samples)[0]
    with torch.no_grad():
        right = net()(x).argmax(1)
    wrong = torch.arange(samples) % 8 == 0
    return x, torch.where(wrong, (right + 1) % 10, right)


def evaluated(given: Any = None, attacks: Any = ATTACKS, **settings: Any) -> Report:
    """A quiet evaluation in float32."""
    model = settings.pop("model", None) or FastAttackModel(net(), **FLOAT32)
    return evaluate(
        model,
        data() if given is None else given,
        attacks,
        **{"eps": EPS, "progress": False, "batch_size": 8, **settings},
    )


def verdicts(report: Report) -> list[dict[str, Any]]:
    """What does not depend on time, or on who stood beside whom."""
    return [comparable(row) for row in report.samples]


def comparable(row: Row) -> dict[str, Any]:
    """A row without its time and passes."""
    return {name: value for name, value in row.as_dict().items() if name not in ("seconds", "forward", "backward")}


def lines(folder: Path) -> list[str]:
    """All lines of finished samples."""
    return [line for path in sorted(folder.glob("rows*.jsonl")) for line in path.read_text().splitlines()]
