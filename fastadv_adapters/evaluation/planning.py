"""From what was asked for to stages that can run: everything is looked at before anything is written."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attack import (
    Norm,
    accept_bounds,
    accept_count,
    accept_norm,
    accept_size,
    doubt_budget,
    doubt_images,
    doubt_logits,
    doubt_mode,
)
from ..comparison import doubt_own
from ..model import FastAttackModel
from ..modules import accept_flag, by_its_own_eval
from ..options import FastAttackOptions, check_options
from .attacks import attacks_of
from .confirming import SIZE, Judge
from .data import Samples, Seen, look_at, samples_of
from .identity import model_hash, settings_of, versions
from .rows import Row
from .stages import Attack, Setting, Stage


@dataclass(frozen=True)
class Asked:
    """The arguments of ``evaluate``, which says what they mean."""

    model: nn.Module
    data: Any
    attacks: Any
    eps: Any
    norm: Norm
    bounds: tuple[float, float]
    batch_size: int
    output: str | os.PathLike[str] | None
    resume: bool
    progress: bool
    seed: int
    limit: int | None
    options: FastAttackOptions | None
    callback: Callable[[Row], object] | None

    def __post_init__(self) -> None:
        _budgets(self.eps)
        accept_norm(self.norm)
        accept_bounds(self.bounds)
        accept_flag("resume", self.resume)
        accept_flag("progress", self.progress)
        accept_count("batch_size", self.batch_size, least=1)
        accept_count("seed", self.seed, least=0)
        if self.limit is not None:
            accept_count("limit", self.limit, least=1)
        if self.options is not None:
            check_options(self.options)
        if isinstance(self.model, FastAttackModel) and self.options:
            raise ValueError(
                f"expected no options for a model that is fast already, got {', '.join(self.options)}: give them to "
                f"FastAttackModel"
            )


@dataclass(frozen=True)
class Plan:
    """An evaluation, ready to run.

    Attributes:
        stages: attacks with budgets, in the order in which samples pass them.
        header: what has to be the same in a call that goes on, as JSON gives it back.
        failed: how many audits of the fast model had failed before.
    """

    samples: Samples
    seen: Seen
    setting: Setting
    stages: list[Stage]
    header: dict[str, Any]
    failed: int


def plan_of(asked: Asked) -> Plan:
    """Look at the model and at all samples."""
    model = asked.model
    # Up to date, whatever its options are: the model is judged as it is.
    fast = model.update() if isinstance(model, FastAttackModel) else FastAttackModel(model, **(asked.options or {}))
    before = settings_of(fast.wrapped)
    judge, bounds = Judge(fast.wrapped, asked.seed), accept_bounds(asked.bounds)
    samples = samples_of(asked.data, asked.limit)
    seen = look_at(samples, bounds, judge.classes)
    x = samples.read(range(min(SIZE, samples.count)))[0].to(judge.device)
    setting = Setting(
        model=fast.wrapped,
        fast=fast,
        judge=judge,
        norm=accept_norm(asked.norm),
        bounds=bounds,
        batch_size=asked.batch_size,
        seed=asked.seed,
        classes=judge.classes(x[:2]),
        shape=tuple(x.shape[1:]),
        random=judge.notice_randomness(x),
        options=asked.options or _own_options(fast),
    )
    attacks = attacks_of(asked.attacks, random=setting.random)
    budgets = _budgets(asked.eps)
    stages = [attack.stage(setting, budget) for budget in budgets for attack in attacks]
    other = None if setting.random else by_its_own_eval(fast.wrapped)
    logits = judge.logits(x, "logits")
    doubts = [
        doubt_budget(budgets[-1], setting.norm, bounds, x[0].numel()),
        doubt_images(x, bounds),
        doubt_logits(logits),
        None if other is None else doubt_mode(logits, Judge(other, asked.seed).logits(x, "logits")),
    ]
    doubts += [attack.doubt(fast.wrapped) for attack in attacks]
    notes = [note for note in doubts if note is not None]
    for attack in attacks:
        notes += doubt_own(attack.name, attack.own, budgets, setting.norm)
    after = settings_of(fast.wrapped)
    stay = {name: text for name, text in before.items() if after.get(name) == text}  # the others count, say
    header = _header(asked, setting, attacks, budgets, seen, notes, stay)
    return Plan(samples, seen, setting, stages, header, fast._networks.failed)


def _header(
    asked: Asked,
    setting: Setting,
    attacks: list[Attack],
    budgets: list[float],
    seen: Seen,
    notes: list[str],
    stay: dict[str, str],
) -> dict[str, Any]:
    """Nothing that changes rounding alone is in it."""
    settings = {
        "norm": setting.norm,
        "bounds": setting.bounds,
        "eps": budgets,
        "attacks": {attack.name: attack.description + attack.transferred_from(setting.model) for attack in attacks},
        "seed": setting.seed,
        "limit": asked.limit,
        "options": {name: str(value) for name, value in sorted({**setting.fast._given, **setting.options}.items())}
        | ({"full_precision": "True"} if setting.fast._full_precision else {}),
    }
    model = setting.model
    header = {
        "settings": settings,
        "model": {
            "class": type(model).__qualname__,
            "hash": model_hash(model),
            "settings": stay,
            "random": setting.random,
            "classes": setting.classes,
        },
        "data": {"samples": len(seen.labels), "hash": seen.fingerprint},
        "versions": versions(attacks),
    } | ({"notes": notes} if notes else {})
    return dict(json.loads(json.dumps(header)))


def _own_options(fast: FastAttackModel) -> FastAttackOptions:
    """What a fast model was asked for that attacks would get otherwise."""
    options: FastAttackOptions = {}
    if fast._decisions != "auto":
        options["decisions"] = fast._decisions
    if fast._logits_dtype != torch.float32:
        options["logits_dtype"] = fast._logits_dtype
    return options


def _budgets(eps: Any) -> list[float]:
    """One or several budgets, the smallest first."""
    several = list(eps) if isinstance(eps, Sequence) and not isinstance(eps, str) else [eps]
    if not several:
        raise ValueError("expected at least one budget in eps, got none: pass a number, or several for a curve")
    return sorted({accept_size("eps", one) for one in several})
