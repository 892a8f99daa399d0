"""``evaluate``: the robust accuracy of a model on a data set, with files from which it can go on."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attack import Norm, accept_bounds, accept_count, accept_norm, accept_size
from ..model import FastAttackModel
from ..modules import need
from ..options import FastAttackOptions
from .attacks import attacks_of
from .confirming import SIZE, Judge
from .data import Samples, Seen, look_at, samples_of
from .identity import model_hash, options_text, versions
from .progress import Progress
from .report import Report
from .rows import Row
from .running import Sink, run
from .sharing import Sharing, sharing
from .stages import Attack, Setting, Stage
from .store import SHOWN, Finished, Folder, Writer


def evaluate(
    model: nn.Module,
    data: Any,
    attacks: Any,
    *,
    eps: float | Sequence[float],
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 128,
    output: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
    seed: int = 0,
    limit: int | None = None,
    options: FastAttackOptions | None = None,
    callback: Callable[[Row], object] | None = None,
) -> Report:
    """Attack every sample of a data set, and report how many stand.

    Each attack gets the samples that stood up to those before. Attacks run on a fast copy of the model; the plain
    model, in its own precision and in batches of one fixed size, judges every candidate. Under ``torchrun`` all
    processes make the same call and share the samples.

    Args:
        model: a plain ``nn.Module``, or a :class:`~fastadv_adapters.FastAttackModel`; it gives logits (N, C).
        data: a ``DataLoader``, a ``Dataset``, a pair of tensors ``(x, y)``, or an iterable of such pairs, batched or
            not. Images are floating and within ``bounds``, labels are integers. Indices are those of the data set
            whatever the order of a loader; an iterable is read once and kept in memory.
        attacks: ``"quick"`` (SafePGD, 20 steps), ``"strong"`` (SafePGD of 100 steps, two starts each with the losses ce
            and margin, and one for each of the nine likeliest other classes), ``"standard"`` (AutoAttack's APGD-CE,
            APGD-T, FAB-T and Square with the settings of its authors; needs ``pyautoattack``); one or a list of names
            (``"safe-pgd-ce-50"``, ``"safe-pgd-50x2"``, ``"apgd-t"``), torchattacks attacks, foolbox attacks,
            ``SafePGD`` objects, and callables ``(model, x, y)`` or ``(x, y)`` that return candidates. Attacks that are
            given as objects keep budgets of their own; foolbox attacks get ``eps``.
        eps: the budget, in units of the images and of the norm; or several, for a curve: what breaks within a budget is
            broken within larger ones, and only the rest is attacked there.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: the least and the largest value of an image.
        batch_size: samples that are attacked at once, at least 1. SafePGD takes no fewer than 8, for kernels round
            a single row otherwise. Its verdicts do not depend on this but for rounding; those of other libraries do,
            since they draw random numbers for a batch.
        output: a folder for all that is found; None to keep it in memory. Several processes need one.
        resume: whether to go on with what is in the folder; False if it has to be new.
        progress: whether to show a bar, or lines where the output is no terminal; of several processes one does.
        seed: of all random numbers.
        limit: how many samples to take, the first ones; None for all.
        options: of :class:`~fastadv_adapters.FastAttackModel`, if ``model`` is plain.
        callback: is given each :class:`Row` once it is written, by the process that found it.

    Returns:
        The report, in every process.

    Raises:
        TypeError, ValueError: an argument, an image or a label is not as described, or the folder holds another
            evaluation; nothing has been written then.
        OSError: the folder cannot be written to, or is full; what was finished stays.
        ImportError: a library that an attack or the folder needs is missing.
    """
    budgets = _budgets(eps)
    norm, bounds = accept_norm(norm), accept_bounds(bounds)
    accept_count("batch_size", batch_size, least=1)
    accept_count("seed", seed, least=0)
    if limit is not None:
        accept_count("limit", limit, least=1)
    if isinstance(model, FastAttackModel) and options:
        raise ValueError(
            f"expected no options for a model that is fast already, got {', '.join(options)}: give them to "
            f"FastAttackModel"
        )
    fast = model if isinstance(model, FastAttackModel) else FastAttackModel(model, **(options or {}))
    together = sharing()
    if together.world > 1 and output is None:
        raise ValueError(f"expected an output folder that all {together.world} processes share, got None: pass output")
    if output is not None:
        need("safetensors.torch", extra="evaluate")
    plain, judge = fast.wrapped, Judge(fast.wrapped, seed)
    settings = {
        "norm": norm,
        "bounds": bounds,
        "seed": seed,
        "limit": limit,
        "options": options_text(dict(options or {})),
    }

    def prepared() -> Plan:
        samples = samples_of(data, limit)
        seen = look_at(samples, bounds, judge.classes)
        x, _ = samples.read(range(min(SIZE, samples.count)))
        random = judge.notice_randomness(x.to(judge.device))
        chosen = attacks_of(attacks, random=random)
        setting = Setting(plain, fast, judge, norm, bounds, batch_size, seed, judge.classes(x[:2]), random)
        stages = [attack.stage(setting, budget) for budget in budgets for attack in chosen]
        header = _header(settings, budgets, chosen, plain, seen, random)
        return Plan(samples, seen, setting, stages, header)

    return _run(prepared, together, output, resume=resume, progress=progress, callback=callback)


@dataclass(frozen=True)
class Plan:
    """An evaluation, looked at and ready to run."""

    samples: Samples
    seen: Seen
    setting: Setting
    stages: list[Stage]
    header: dict[str, Any]


def _run(
    prepared: Callable[[], Plan],
    together: Sharing,
    output: str | os.PathLike[str] | None,
    *,
    resume: bool,
    progress: bool,
    callback: Callable[[Row], object] | None,
) -> Report:
    folder = None if output is None else Folder(output)
    plans: list[Plan] = []

    def begin() -> dict[str, Any]:
        plans.append(prepared())
        if folder is None:
            return {"run": 0, "finished": []}
        folder.begin(plans[0].header, resume=resume)
        folder.clean_up()
        return {"run": folder.next_run(), "finished": sorted(folder.rows())}

    shared = together.plan(begin)
    plan = plans[0] if plans else prepared()
    rows = {} if folder is None else folder.rows()
    finished = set(shared["finished"])
    images: dict[int, tuple[Tensor, Tensor | None]] = {}
    writer = None if folder is None else Writer(folder, f"{shared['run']:04}-{together.rank:04}")

    def write(some: list[Finished]) -> None:
        if writer is not None:
            writer.write(some)
            return
        for one in some:
            rows[one.row.index] = one.row
            if one.adversarial is not None:
                clean = one.clean.cpu() if one.row.index < SHOWN else None
                images[one.row.index] = one.adversarial.cpu(), clean

    broken = sum(rows[index].broken_by is not None for index in finished)
    todo = [index for index in range(plan.samples.count) if index not in finished]
    show = progress and together.rank == 0
    with Progress(plan.samples.count, len(finished), broken, show=show) as shown:
        sink = Sink(together, write, shown.update, callback)
        run(together.chunks(todo), plan.samples, plan.seen, plan.stages, plan.setting, sink)
        while folder is not None and (more := together.inherited(lambda: set(folder.rows()))) is not None:
            run([more], plan.samples, plan.seen, plan.stages, plan.setting, sink)
        shown.update(together.done([], 0), last=True)
    if folder is None:
        return Report.of(plan.header, rows, lambda: images)
    together.close(folder.merge)
    return Report.load(folder.path)


def _header(
    settings: dict[str, Any], budgets: list[float], attacks: list[Attack], model: nn.Module, seen: Seen, random: bool
) -> dict[str, Any]:
    """What has to be the same in a call that goes on, as JSON gives it back."""
    header = {
        "settings": {**settings, "eps": budgets, "attacks": {attack.name: attack.description for attack in attacks}},
        "model": {"class": type(model).__qualname__, "hash": model_hash(model), "random": random},
        "data": {"samples": len(seen.labels), "hash": seen.fingerprint},
        "versions": versions(attacks),
    }
    found: dict[str, Any] = json.loads(json.dumps(header))
    return found


def _budgets(eps: Any) -> list[float]:
    """One or several budgets, the smallest first."""
    several = list(eps) if isinstance(eps, Sequence) and not isinstance(eps, str) else [eps]
    if not several:
        raise ValueError("expected at least one budget in eps, got none: pass a number, or several for a curve")
    return sorted({accept_size("eps", one) for one in several})
