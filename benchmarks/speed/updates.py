"""`update()` after a change of all weights, between its floor and the recipe's way."""

from collections.abc import Callable

import torch

from benchmarks.shared.networks import WideResNet, settle_statistics
from benchmarks.shared.recipe import RecipeModel
from benchmarks.shared.report import Part, Table, milliseconds, timing_record
from benchmarks.shared.rows import half_of, short
from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import Way, measure_in_turn


def tensor_addresses(fast: FastAttackModel) -> list[int]:
    """The storage addresses of all tensors that the fast network and the twin run on."""
    networks = fast._networks
    parts = [*networks.folded.network.modules(), *networks.twin.engine.network.modules()]
    frozen = [t for part in parts for t in vars(part).get("scale_and_shift", {}).values()]
    registered = [t for part in parts for t in (*part.parameters(False), *part.buffers(False))]
    return sorted(t.data_ptr() for t in (*frozen, *registered))


def plain_copy(fast: FastAttackModel, *, channels_last: bool = False, together: bool = False) -> Callable[[], None]:
    """The floor of an update: every parameter copied into the fast network's own tensor, where it has one of its shape.

    Into that one itself, since memory elsewhere may be faster or slower. What is copied there is not folded: only the
    next update makes the network right again.

    Args:
        fast: has both networks.
        channels_last: lay out four-dimensional tensors so, whatever layout they have there; in memory elsewhere.
        together: by one call for all, instead of one for each.
    """
    sources = {name: p.detach() for name, p in fast.wrapped.named_parameters()}
    own = dict(fast._networks.folded.network.named_parameters())
    like = [own[name] if name in own and own[name].shape == p.shape else p for name, p in sources.items()]
    if channels_last:
        formats = [torch.channels_last if t.ndim == 4 else torch.contiguous_format for t in like]
        targets = [torch.empty_like(t, memory_format=f) for t, f in zip(like, formats, strict=True)]
    else:
        targets = [
            t.detach() if t is own.get(name) else torch.empty_like(t) for name, t in zip(sources, like, strict=True)
        ]

    def copy() -> None:
        with torch.no_grad():
            if together:
                torch._foreach_copy_(targets, list(sources.values()))
                return
            for source, target in zip(sources.values(), targets, strict=True):
                target.copy_(source)

    return copy


def update_part(device: torch.device, *, depth: int, width: int, repeats: int) -> Part:
    """`update()` on a wide residual network, in float32 and in the default dtype, in turn with the other ways."""
    x = torch.rand(4, 3, 32, 32, device=device)
    model = settle_statistics(WideResNet(depth=depth, width=width).to(device), x)
    half = half_of(device)
    dtypes = (torch.float32, *((half,) if half else ()))
    fasts = {dtype: FastAttackModel(model, dtype=dtype) for dtype in dtypes}
    recipe = RecipeModel(model)
    parameters = list(model.parameters())

    def change() -> None:
        with torch.no_grad():
            torch._foreach_mul_(parameters, 1.0001)  # type: ignore[arg-type]

    ways: dict[str, Way] = {}
    for dtype, fast in fasts.items():
        name = short(dtype)
        copies = {
            f"plain copy, {name}": plain_copy(fast),
            f"plain copy, {name}, channels-last": plain_copy(fast, channels_last=True),
        }
        if device.type == "cuda":
            copies[f"plain copy, {name}, one call"] = plain_copy(fast, together=True)
        ways[f"update(), {name}"] = Way(fast.update, change)
        ways.update({copy: Way(run, change) for copy, run in copies.items()})
    ways["recipe's update, float32"] = Way(recipe.update, change)
    before = {dtype: tensor_addresses(fast) for dtype, fast in fasts.items()}
    timings = measure_in_turn(ways, device=device, repeats=repeats, warmup=2)
    unchanged = all(tensor_addresses(fast) == before[dtype] for dtype, fast in fasts.items())
    floors = {short(d): timings[f"plain copy, {short(d)}"].median for d in dtypes}
    rows = []
    for way, timing in timings.items():
        dtype_name = next((name for name in floors if f", {name}" in way), short(torch.float32))
        rows.append((way, milliseconds(timing), f"{timing.median / floors[dtype_name]:.2f}x"))
    table = Table(
        f"Update of a WRN-{depth}-{width} after a change of all weights",
        ("way", "ms, median (quartiles)", "to the plain copy"),
        rows,
        "Plain copy: each weight is copied into the fast network's own tensor, or into a new one if the fast network "
        "has none of its shape. On processors that tensor mostly has the layout of the wrapped model's. The recipe's "
        "update traces, folds, freezes and lays out again. The addresses of all "
        f"{len(before[torch.float32])} tensors are {'unchanged' if unchanged else 'CHANGED'} by update().",
    )
    record = {
        "timings": {way: timing_record(timing) for way, timing in timings.items()},
        "to_plain_copy": {name: timings[f"update(), {name}"].median / floor for name, floor in floors.items()},
        "addresses_unchanged": unchanged,
    }
    return Part([table], record)
