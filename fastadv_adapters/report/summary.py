"""What a fast model did with the model it wraps, as text."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..modules import HALF, is_in_hardware, modules_of
from ..networks import Networks
from .alignment import Misfit, misfits

_DECISIONS = {
    "auto": "those of the wrapped model in passes without gradient, and always in known minimum-norm attacks",
    "exact": "always those of the wrapped model; gradients come from the fast network",
    "fast": "always those of the fast network, which may differ from the wrapped model's",
}

_MOST_MISFITS = 8
_NUMBER, _NUMBER_KEPT = re.compile(r"\d+"), re.compile(r"(\d+)")
_NAMELESS = re.compile(r"(?<![\w.])(\d+)$")
"""A layer of an ``nn.Sequential`` at the end of a text."""


def summarise(networks: Networks, options: dict[str, Any]) -> str:
    """A line per fact, then on batch norms, equal ones together, and on sizes that do not suit tensor cores."""
    precision, in_place = networks.precision, len(networks.folded.in_place)
    facts = {
        "device": precision.device,
        "dtype": _dtype(networks) + (", but this view in full precision" if options["full_precision"] else ""),
        "memory format": "channels-last" if precision.channels_last else "contiguous",
        "engine": networks.fast.name,
        "mode": "eval, whichever mode the model is in",
        "decisions": _DECISIONS[options["decisions"]],
        "logits": _short(options["logits_dtype"]),
        "loss scale": _scale(networks, options["loss_scale"]),
        "updates": f"{'automatic' if options['auto_update'] else 'by update() only'}, {networks.updates} so far",
        "self-check": f"{'done' if networks.kinds else 'due'} at the first gradient pass",
        "in place": f"{in_place or 'no'} activation{'' if in_place == 1 else 's'}",
        "speed": _speed(networks),
    }
    lines = [f"FastAttackModel of {type(networks.source).__name__}"]
    lines += [f"  {name:<14} {value}" for name, value in facts.items()]
    lines += [f"  note           {note}" for note in networks.notes]
    found = misfits(networks.source, precision.device.type, precision.dtype)
    return "\n".join(lines + _batch_norms(networks) + tensor_core_lines(found))


def _dtype(networks: Networks) -> str:
    dtype, why = _short(networks.precision.dtype), networks.choice.why
    found = [_short(kind.runs_in) for kind in networks.kinds.values()]
    moved = [f"{other} in {found.count(other)} of {len(found)} kinds of calls" for other in sorted({*found} - {dtype})]
    return ", but ".join([f"{dtype} ({why})" if why else dtype, *moved])


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _scale(networks: Networks, loss_scale: object) -> str:
    kinds = list(networks.kinds.values())
    together = [kind for kind in kinds if not kind.apart]
    if loss_scale != "per-sample" or not together:
        return str(loss_scale) + ("" if networks.dtype in HALF else "; float32 seldom needs it")
    coupled = any(kind.coupled for kind in together)
    why = "samples of this model see each other" if coupled else "what it returns has no row per sample"
    if len(together) == len(kinds):
        return f"per-call, since {why}"
    return f"per-sample, and per-call in {len(together)} of {len(kinds)} kinds of calls, since there {why}"


def _speed(networks: Networks) -> str:
    """What to expect, which depends on the model; measuring is not for a summary."""
    gain = "half precision, the faster the larger the layers are"
    if networks.dtype not in HALF:
        folded = any(done.startswith("folded") for done in networks.folded.report.values())
        gain = f"no half precision, {'so the gain is smaller' if folded else 'nothing folded: perhaps no gain'}"
    elif not is_in_hardware(networks.dtype, networks.precision.device):
        gain = "half precision without hardware, slower than float32"
    return f"{gain} (docs/performance.md); first calls are slow"


def _batch_norms(networks: Networks) -> list[str]:
    """What became of each batch norm, and which parts did not trace."""
    report = networks.folded.report
    if not networks.fuse_bn:
        return ["  batch norm     left as it is: fuse_bn=False"]
    if not report:
        found = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules_of(networks.source))
        return ["  batch norm     " + ("left as it is, see the note above" if found else "none in this model")]
    together = in_groups(report)
    width = max(len(name) for name in together)
    lines = [f"    {name:<{width}}  {done}" for name, done in together.items()]
    opaque = networks.opaque
    lines += [
        f"    {name or 'the model itself'} does not trace ({why}): its parts were tried" for name, why in opaque.items()
    ]
    return [f"  batch norm     {_count(report)}", *lines]


def in_groups(report: dict[str, str]) -> dict[str, str]:
    """The report with those put together that differ in numbers alone, which become stars: ``"layers.*.norm (12)"``."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for entry in report.items():
        name, done = (_NAMELESS.sub(r"layer \1", text) for text in entry)
        groups.setdefault((_NUMBER.sub("*", name), _NUMBER.sub("*", done)), []).append((name, done))
    found = {}
    for group in groups.values():
        name, done = (_with_stars(texts) for texts in zip(*group, strict=True))
        found[f"{name} ({len(group)})" if len(group) > 1 else name] = done
    return found


def _with_stars(texts: Sequence[str]) -> str:
    """Texts that differ in numbers alone as one, with a star for each number that is not always the same."""
    columns = zip(*map(_NUMBER_KEPT.split, texts), strict=True)
    return "".join(column[0] if len(set(column)) == 1 else "*" for column in columns)


def _count(report: dict[str, str]) -> str:
    counts = {kind: sum(done.startswith(kind) for done in report.values()) for kind in ("folded", "frozen", "kept")}
    return ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)


def tensor_core_lines(found: list[Misfit]) -> list[str]:
    """What :func:`fastadv_adapters.report.alignment.misfits` has found, what it costs, and what to do."""
    if not found:
        return []
    width = max(len(layer.name) for layer in found[:_MOST_MISFITS])
    lines = [f"    {layer.name or 'the model itself':<{width}}  {_misfit(layer)}" for layer in found[:_MOST_MISFITS]]
    if (left := len(found) - _MOST_MISFITS) > 0:
        lines.append(f"    and {left} with less work")
    head = f"{len(found)} with sizes that are no multiples of 8; see docs/guides/options.md#sizes-for-tensor-cores"
    return [f"  tensor cores   {head}", *lines]


def _misfit(layer: Misfit) -> str:
    sizes = (layer.inputs, layer.outputs), layer.padded, layer.better
    given, padded, better = (f"{inputs} -> {outputs}" for inputs, outputs in sizes)
    advice = f"cheap: usual for a {layer.usual} layer" if layer.usual else f"better {better}"
    return f"{given} {layer.unit}: padded to {padded} it is {layer.factor:.2f} times the work; {advice}"
