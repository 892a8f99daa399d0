"""``evaluate``: the robust accuracy of a model on a data set, with files from which it can go on."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attack import Norm
from ..comparison import lent_in_eval_mode
from ..modules import need
from ..options import FastAttackOptions
from .lookalikes import with_one_data
from .planning import Asked, Plan, plan_of
from .progress import Progress
from .report import Report
from .rows import Row
from .running import Sink, run
from .sharing import Sharing, sharing
from .store import SHOWN, Finished, Folder, Writer, difference


@with_one_data
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

    Each attack gets the samples that stood up to those before. Attacks run on a fast copy; the plain model judges every
    candidate, in its own precision. Under ``torchrun`` all processes make the same call and share the samples.

    Args:
        model: a plain ``nn.Module`` or a ``FastAttackModel``; it gives logits (N, C). It is evaluated in eval mode,
            and left in the mode that it is in.
        data: a ``DataLoader``, a ``Dataset``, a pair of tensors ``(x, y)`` or an iterable of such pairs, which is read
            once. Images are floating and within ``bounds``, labels integers. A loader's data set is read in the order
            of its indices, so shuffling changes nothing, ``limit`` included.
        attacks: one of these, or a list: a preset, ``"quick"``, ``"strong"`` or ``"standard"`` (AutoAttack); a name
            (``"safe-pgd[-LOSS][-STEPS][xSTARTS]"`` with LOSS ``auto``, ``ce``, ``margin`` or ``dlr``, 50 steps and one
            start if these are left out; ``"safe-pgd-targeted[-STEPS]"``; ``"apgd-ce"``, ``"apgd-dlr"``, ``"apgd-t"``,
            ``"fab"``, ``"fab-t"``, ``"square"``); an attack of torchattacks or foolbox; a ``SafePGD`` with the same
            ``eps``, ``norm`` and ``bounds``; a callable that returns candidates: ``(model, x, y)``, which is given the
            fast model, or ``(x, y)``.
        eps: the budget, in units of x and of the norm; or several, for a curve. Attacks of torchattacks and callables
            keep their own: images outside of eps do not count as broken, and the report says how many there are.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: the least and the largest value of an image.
        batch_size: samples that are attacked at once; SafePGD takes no fewer than 8. Its verdicts depend on this by
            rounding alone; attacks of other libraries draw random numbers for a batch.
        output: a folder for all that is found, None for memory; several processes need one.
        resume: whether to go on with what is in the folder; False if it has to be new.
        progress: whether to show a bar, or lines if the output is no terminal or ``rich`` is missing.
        seed: of all random numbers, at least 0.
        limit: how many samples to take, the first ones; None for all.
        options: of ``FastAttackModel``, if ``model`` is plain. ``decisions`` and ``logits_dtype``, if given, replace
            what each attack would get; ``SafePGD`` sets them itself.
        callback: is given each row once it is written, by the process that found it.

    Returns:
        A :class:`Report`, the same one in every process.

    Raises:
        TypeError, ValueError: an argument or a sample is not as described, or the folder holds another evaluation.
        OSError: the folder cannot be written to, or is full.
        ImportError: AutoAttack without the extra ``autoattack``, or ``output`` without the extra ``evaluate``.
    """
    given = (model, data, attacks, eps, norm, bounds, batch_size, output, resume, progress, seed, limit)
    return _carried_out(Asked(*given, options, callback))


@torch.inference_mode(False)
@torch.enable_grad()  # attacks need gradients, whatever the caller is in
def _carried_out(asked: Asked) -> Report:
    together = sharing()
    if asked.output is None:
        if together.world > 1:
            raise ValueError(
                f"expected an output folder that all {together.world} processes share, got None: pass output=FOLDER"
            )
        return _in_memory(asked, together)
    need("safetensors.torch", extra="evaluate")
    return _in_folder(asked, together, Folder(asked.output))


def _in_memory(asked: Asked, together: Sharing) -> Report:
    plan = plan_of(asked)
    rows: dict[int, Row] = {}
    images: dict[int, tuple[Tensor, Tensor | None]] = {}

    def keep(some: list[Finished]) -> None:
        for one in some:
            index = one.row.index
            rows[index] = one.row
            if one.adversarial is not None:
                # Copies: what they are views of is a whole batch.
                images[index] = one.adversarial.cpu().clone(), one.clean.cpu() if index < SHOWN else None

    _attack(asked, plan, together, {}, keep)
    return Report.of(plan.header, rows, lambda among: images, plan.setting.fast._networks.findings[plan.failed :])


def _in_folder(asked: Asked, together: Sharing, folder: Folder) -> Report:
    plans: list[Plan] = []

    def begin() -> dict[str, Any]:
        plans.append(plan_of(asked))
        folder.begin(plans[0].header, resume=asked.resume)
        folder.clean_up()
        same = {part: plans[0].header[part] for part in ("model", "data")}
        return {"run": folder.next_run(), "finished": sorted(folder.rows()), "same": same}

    try:
        shared = together.plan(begin)
        plan = plans[0] if plans else plan_of(asked)
        _expect_the_same(shared["same"], plan, together.rank)
        known = folder.rows()
        finished = {index: known[index] for index in shared["finished"]}
        writer = Writer(folder, f"{shared['run']:04}-{together.rank:04}")
        told = plan.failed

        def write(some: list[Finished]) -> None:
            """Findings come first: a process may be killed at any moment."""
            nonlocal told
            new = plan.setting.fast._networks.findings[told:]
            writer.write(some, new)
            told += len(new)

        _attack(asked, plan, together, finished, write, lambda: set(folder.rows()))
        together.close(folder.merge)
    except BaseException as error:  # this process may live on, and is not to be waited for
        together.leave()
        if isinstance(error, KeyboardInterrupt) and not error.args:
            error.args = (f"what is finished is in {folder.path}: the same call goes on",)
        raise
    return Report.load(folder.path)


def _expect_the_same(first: dict[str, Any], plan: Plan, rank: int) -> None:
    """Raise unless this process has the model and the data of the first one: their rows make one number."""
    for part, theirs in first.items():
        if found := difference(theirs, plan.header[part], part):
            name, there, here = found
            raise ValueError(
                f"expected all processes to have the same {name}, got {there!r} in process 0 and {here!r} in process "
                f"{rank}: load the same weights and the whole data set in each (after steps of DDP running statistics "
                f"differ: broadcast the buffers); evaluate shares the samples out"
            )


def _attack(
    asked: Asked,
    plan: Plan,
    together: Sharing,
    finished: dict[int, Row],
    write: Callable[[list[Finished]], None],
    written: Callable[[], set[int]] = set,
) -> None:
    """Attack all samples that are not finished; ``written`` says which ones any process has finished since.

    Attacks may close over the plain model: it is lent to them in eval mode.
    """
    todo = [index for index in range(plan.samples.count) if index not in finished]
    broken = sum(row.broken_by is not None for row in finished.values())
    show = asked.progress and together.rank == 0
    notes = plan.header.get("notes", [])
    begun = max(finished, default=-1) + 1  # they are begun in order
    counts = plan.samples.count, len(finished), broken
    bar = Progress(*counts, begun=begun, notes=notes, source=asked.output, show=show)
    with lent_in_eval_mode(plan.setting.model), bar as shown:
        sink = Sink(together, write, shown.update, asked.callback)
        chunks: Any = together.chunks(todo)
        while chunks is not None:
            run(chunks, plan, sink)
            inherited = together.inherited(written)
            chunks = None if inherited is None else [inherited]
        shown.update(together.done([], 0), last=True)
