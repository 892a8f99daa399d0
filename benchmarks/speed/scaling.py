"""Does the work grow as it should? Twice the steps, twice the batch, hundreds of attacks, samples that fall early."""

import gc
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.shared.budget import Budget
from benchmarks.shared.correctness import Subject
from benchmarks.shared.report import Part, Table, milliseconds, timing_record
from benchmarks.shared.rows import EPS, Setup, torchattacks_pgd
from benchmarks.speed.cases import Case, resnet18_case
from benchmarks.speed.measurement import Effort
from benchmarks.speed.memory import held
from digits import accuracy, predict
from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.comparison import Way, measure_in_turn

ONCE, STEPS, BATCH = "once", "twice the steps", "twice the batch"


def scaling_part(case: Case, effort: Effort, device: torch.device, *, budget: Budget, seed: int) -> Part:
    """Time an attack, one of twice the steps, and one on twice the batch, in turn."""
    model, x, y = replace(case, batch=2 * case.batch).make(device, seed=seed)
    fast = FastAttackModel(model)
    half, steps = case.batch, effort.steps
    ways = {
        ONCE: _attack(fast, x[:half], y[:half], steps),
        STEPS: _attack(fast, x[:half], y[:half], 2 * steps),
        BATCH: _attack(fast, x, y, steps),
    }
    timings = measure_in_turn(ways, device=device, repeats=effort.repeats, warmup=1, budget=budget)
    ratios = {name: timing.median / timings[ONCE].median for name, timing in timings.items()}
    rows = [(name, milliseconds(timing), f"{ratios[name]:.2f}x") for name, timing in timings.items()]
    title = f"Twice the work: PGD-{steps} on {case.title}, ours"
    table = Table(title, ("work", "ms, median (quartiles)", "to once"), rows)
    record = {name: {**timing_record(timings[name]), "ratio": ratios[name]} for name in timings}
    return Part([table], record)


def _attack(fast: FastAttackModel, x: Tensor, y: Tensor, steps: int) -> Way:
    prepared = torchattacks_pgd(fast, Setup(EPS, steps, x.device))
    return Way(lambda: prepared.attack(x, y))


def growth_part(device: torch.device, *, rounds: int, seed: int) -> Part:
    """Hold the memory before and after many updates and attacks on a small network against each other.

    On a processor in a process of its own: in this one, memory that was freed before would hide what is not freed.
    """
    if device.type == "cuda":
        return _growth(device, rounds, seed)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_growth, device, rounds, seed).result()


def _growth(device: torch.device, rounds: int, seed: int) -> Part:
    model, x, y = resnet18_case(width=8, batch=32).make(device, seed=seed)
    fast = FastAttackModel(model)
    attack = torchattacks_pgd(fast, Setup(EPS, 2, device)).attack
    safe = SafePGD(fast, eps=EPS, steps=2, early_stop=True)
    parameters = list(model.parameters())

    def go(times: int) -> int | None:
        for _ in range(times):
            with torch.no_grad():
                torch._foreach_mul_(parameters, 1.0001)  # type: ignore[arg-type]
            fast.update()
            attack(x, y)
            safe(x, y)
        gc.collect()
        return held(device)

    warmup = max(rounds // 4, 1)
    before, after = go(warmup), go(rounds)
    grown = None if before is None or after is None else after - before
    what = "tensors on the GPU" if device.type == "cuda" else "the whole process"
    told = [
        (
            f"{rounds} updates and attacks, after {warmup} to warm up",
            *("not told here" if size is None else f"{size / 2**20:.1f}" for size in (before, after, grown)),
        )
    ]
    table = Table(
        "Growth of memory",
        ("rounds", "MiB before", "MiB after", "grown"),
        told,
        f"Held by {what}; a ResNet-18 of width 8, batch 32, PGD-2 and SafePGD-2, ours. A batch of images is "
        f"{x.nbytes / 2**20:.2f} MiB.",
    )
    return Part([table], {"rounds": rounds, "before": before, "after": after, "grown": grown, "batch": x.nbytes})


@contextmanager
def counting_forward() -> Iterator[list[int]]:
    """Collects the batch sizes of all forward passes of fast models inside."""
    sizes: list[int] = []
    forward = FastAttackModel.forward

    def counted(fast: FastAttackModel, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(args[0]))
        return forward(fast, *args, **kwargs)

    with mock.patch.object(FastAttackModel, "forward", counted):
        yield sizes


def early_stop_part(subject: Subject, *, steps: int, seed: int) -> Part:
    """Count the samples that pass forward and backward with and without early stop, and compare who is broken."""
    x, y = (part[: subject.images] for part in (subject.data.test_images, subject.data.test_labels))
    counts: dict[bool, int] = {}
    forward: dict[bool, int] = {}
    broken: dict[bool, Tensor] = {}
    robust: dict[bool, float] = {}
    # One operator after the other: other engines fill the batch up, and what fills it is counted too.
    fast = FastAttackModel(subject.model, engine="eager")
    for early in (False, True):
        fast.reset_gradient_stats()
        generator = torch.Generator().manual_seed(seed)
        attack = SafePGD(fast, eps=subject.eps, steps=steps, early_stop=early, generator=generator)
        with counting_forward() as rows_seen:
            adversarial = attack(x, y)
        forward[early] = sum(rows_seen)
        counts[early] = fast.gradient_stats.samples
        broken[early] = predict(subject.model, adversarial) != y
        robust[early] = accuracy(subject.model, adversarial, y)
    same = bool((broken[False] == broken[True]).all())
    ratio = counts[False] / max(counts[True], 1)
    rows = [
        ("SafePGD, early stop" if early else "SafePGD", str(counts[early]), str(forward[early]), f"{robust[early]:.1%}")
        for early in (False, True)
    ]
    table = Table(
        f"Early stop: {steps} steps on {subject.images} images, {subject.name} without defence, eps {subject.eps:g}",
        ("way", "samples forward and backward", "samples forward in all", "robust accuracy"),
        rows,
        f"Counted, not timed: {ratio:.2f}x fewer. The broken samples are {'the same' if same else 'OTHER'} samples. "
        "Without early stop each sample has three forward passes without a backward pass: at x, at the last iterate, "
        "and for the exact decision. With it, a candidate gets its exact decision as soon as it looks adversarial.",
    )
    record = {
        "without": counts[False],
        "with": counts[True],
        "ratio": ratio,
        "forward_without": forward[False],
        "forward_with": forward[True],
        "same_broken": same,
        "steps": steps,
    }
    return Part([table], record)
