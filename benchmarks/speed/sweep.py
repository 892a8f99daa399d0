"""Which batch saturates the device, and what batches cost that tensor cores do not like."""

from dataclasses import replace

import torch

from benchmarks.shared.budget import NO_TIME, Budget
from benchmarks.shared.deadline import STOPPED, OutOfTimeError
from benchmarks.shared.report import Part, Table
from benchmarks.shared.rows import EPS, Setup, ours, torchattacks_pgd
from benchmarks.speed.cases import Case
from benchmarks.speed.measurement import Effort
from benchmarks.speed.one_way import forget
from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import Way, measure_in_turn, reason
from fastadv_adapters.modules.precision import HALF

PLAIN, OURS = "torchattacks", "ours"
SATURATED = 0.95
"""The share of the best rate from which on a device counts as saturated."""


def batches_up_to(most: int) -> list[int]:
    """Powers of two up to `most`, and beside some of them a size that is one less, no multiple of 8."""
    powers = [2**k for k in range(most.bit_length()) if 2**k <= most]
    return sorted({*powers, *(power - 1 for power in powers if power >= 32)})


def sweep_part(
    case: Case, effort: Effort, device: torch.device, *, most: int, steps: int, budget: Budget, seed: int
) -> Part:
    """Images x steps per second at every batch size, plain and ours."""
    rates: dict[int, dict[str, float]] = {}
    failures: dict[int, str] = {}
    for batch in batches_up_to(most):
        if budget.left < 0:
            failures[batch] = NO_TIME
            continue
        try:
            with budget.held():
                rates[batch] = _rates(replace(case, batch=batch), effort, device, steps, seed)
        except Exception as error:
            failures[batch] = reason(error)
        except OutOfTimeError:
            failures[batch] = STOPPED
        forget()
    advice = _advice(rates, device)
    rows: list[tuple[str, ...]] = [
        (str(batch), *(f"{found[way]:.4g}" for way in (PLAIN, OURS)), f"{found[OURS] / found[PLAIN]:.2f}x")
        for batch, found in rates.items()
    ]
    rows += [(str(batch), "", "", why) for batch, why in failures.items()]
    columns = ("batch", "images x steps per s, torchattacks", "images x steps per s, ours", "ours to plain")
    table = Table(f"Batch sizes: PGD-{steps} on {case.label}", columns, rows, " ".join(advice))
    return Part([table], {"rates": rates, "failures": failures, "advice": advice})


def _rates(case: Case, effort: Effort, device: torch.device, steps: int, seed: int) -> dict[str, float]:
    model, x, y = case.make(device, seed=seed)
    setup = Setup(EPS, steps, device)
    prepared = {PLAIN: torchattacks_pgd(model, setup), OURS: ours(model, setup)}
    ways = {name: Way(lambda attack=p.attack: attack(x, y)) for name, p in prepared.items()}  # type: ignore[misc]
    timings = measure_in_turn(ways, device=device, repeats=effort.repeats, warmup=1)
    return {name: case.batch * steps / timing.median for name, timing in timings.items()}


def saturating(rates: dict[int, float]) -> int:
    """The smallest batch at which the device is about as fast as it gets."""
    best = max(rates.values())
    return min(batch for batch, rate in rates.items() if rate >= SATURATED * best)


def _advice(rates: dict[int, dict[str, float]], device: torch.device) -> list[str]:
    if not rates:
        return []
    first = {way: saturating({batch: found[way] for batch, found in rates.items()}) for way in (PLAIN, OURS)}
    told = [f"{way} first reaches {SATURATED:.0%} of its best rate at batch {batch}." for way, batch in first.items()]
    return told + _odd_batches(rates, device)


def _odd_batches(rates: dict[int, dict[str, float]], device: torch.device) -> list[str]:
    """What the batches that are no multiples of 8 cost per image, against the next multiple."""
    pairs = [(batch, batch + 1) for batch in rates if batch % 8 and batch + 1 in rates and (batch + 1) % 8 == 0]
    told = [f"batch {odd}: {rates[even][OURS] / rates[odd][OURS]:.2f}x of {even}" for odd, even in pairs]
    if not told:
        return []
    advice = f"Time per image if the batch is no multiple of 8: {', '.join(told)}."
    if on_tensor_cores(device):
        advice += " Tensor cores work on blocks of 8: choose a batch that is a multiple of 8, or fill it up."
    return [advice]


def on_tensor_cores(device: torch.device) -> bool:
    """Whether ours runs in half precision on tensor cores by default."""
    return device.type == "cuda" and FastAttackModel(torch.nn.Linear(8, 8, device=device)).dtype in HALF


def batch_advice(batch: int, device: torch.device) -> str:
    """A sentence if a batch that is measured does not suit the device; empty if it does."""
    if batch % 8 == 0 or not on_tensor_cores(device):
        return ""
    return (
        f" The batch of {batch} is no multiple of 8, on which tensor cores work: --sweep shows what that costs; choose "
        "a multiple of 8, or fill the batch up."
    )
