"""The table of one network: a line per way."""

from collections.abc import Mapping

import torch

from benchmarks.shared.correctness import UNJUDGED, WRONG
from benchmarks.shared.report import Table, milliseconds
from benchmarks.shared.rows import PLAIN, Row, short
from benchmarks.speed.measurement import Found, Measurement
from benchmarks.speed.sweep import batch_advice


def network_table(measurement: Measurement, verdicts: Mapping[str, str], device: torch.device) -> Table:
    """Everything that was measured on one network.

    Args:
        measurement: what was measured.
        verdicts: by key of a way, whether it is right on the confident digits network; empty if not judged.
        device: where; on a GPU memory is the peak of a batch, else what is kept per image.
    """
    gpu = device.type == "cuda"
    by_bytes = _bound_by_bytes(measurement)
    columns = (
        "way",
        "ms, median (quartiles)",
        "images x steps per s",
        "to plain",
        "of matrix peak",
        *(["of the limit"] if by_bytes else []),
        "peak GB" if gpu else "MB kept per image",
        "first, s",
        "update, ms",
        "verdict",
    )
    title = f"PGD-{measurement.steps} on {measurement.case.title}"
    rows = [
        _line(measurement, row, verdicts.get(row.key, UNJUDGED), gpu)
        for row in measurement.rows
        if row.key in measurement.found
    ]
    note = _note(measurement) + batch_advice(measurement.case.batch, device)
    return Table(title, columns, rows, note)


def _line(measurement: Measurement, row: Row, verdict: str, gpu: bool) -> tuple[str, ...]:
    found = measurement.found[row.key]
    seconds, plain = measurement.median(row.key), measurement.median(PLAIN)
    by_bytes = _bound_by_bytes(measurement)
    if found.failure or found.timing is None or seconds is None:
        return row.label, *[""] * (7 + by_bytes), found.failure or "not measured"
    work, rates, steps = measurement.work, measurement.rates, measurement.steps
    return (
        row.label,
        milliseconds(found.timing),
        f"{steps * measurement.case.batch / seconds:.4g}",
        f"{plain / seconds:.2f}x" if plain else "",
        f"{steps * work.flops / rates.flops_per_s[row.dtype] / seconds:.0%}",
        *([f"{steps * rates.floor(work, row.dtype) / seconds:.0%}"] if by_bytes else []),
        _memory(found, gpu),
        "" if found.first_s is None else f"{found.first_s:.3g}",
        f"{1e3 * found.update.median:.3g}" if found.update else found.update_failure or "",
        f"**{verdict}**" if verdict == WRONG else verdict,
    )


def _bound_by_bytes(measurement: Measurement) -> bool:
    """Whether in some dtype the bytes take longer than the operations: then there are two shares to tell."""
    work, rates = measurement.work, measurement.rates
    return any(work.seconds(rate, rates.bytes_per_s, d)[1] > work.flops / rate for d, rate in rates.flops_per_s.items())


def _memory(found: Found, gpu: bool) -> str:
    return "" if found.memory is None else f"{found.memory / (1e9 if gpu else 1e6):.3g}"


def _note(measurement: Measurement) -> str:
    """What holds for this network; the page links to where the columns are explained."""
    work, rates, steps = measurement.work, measurement.rates, measurement.steps
    floors = []
    for dtype, rate in rates.flops_per_s.items():
        flops_s, bytes_s = work.seconds(rate, rates.bytes_per_s, dtype)
        floors.append(
            f"{short(dtype)} {1e3 * steps * flops_s:.4g} ms by operations ({rate / 1e9:.4g} GFLOP/s), "
            f"{1e3 * steps * bytes_s:.4g} ms by bytes"
        )
    if measurement.apart:
        how = f"At least {measurement.rounds} rounds of each way, one after the other, with the memory to itself"
    else:
        how = f"{measurement.rounds} rounds in turn"
    more = f", {measurement.closer} more for ways nearly as fast as the fastest" if measurement.closer else ""
    return (
        f"{how}{more}. A step is {work.flops / 1e9:.4g} GFLOP; convolutions, products "
        f"and attention read and write {work.elements / 1e6:.4g} million entries in it, copied at "
        f"{rates.bytes_per_s / 1e9:.4g} GB/s. So the limit is {'; '.join(floors)}; the larger counts."
    )
