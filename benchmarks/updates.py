"""`update()` after a change of all weights, between its floor and the recipe's way."""

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.networks import WideResNet, settle_statistics
from benchmarks.recipe import RecipeModel
from benchmarks.report import Part, Table, milliseconds, timing_record
from benchmarks.rows import half_of, short
from benchmarks.timing import Way, measure_in_turn
from fastadv_adapters import FastAttackModel


def tensor_addresses(fast: FastAttackModel) -> list[int]:
    """The storage addresses of all tensors that the fast network and the twin run on."""
    networks = fast._networks
    parts = [*networks.folded.network.modules(), *networks.twin.engine.network.modules()]
    frozen = [t for part in parts for t in vars(part).get("scale_and_shift", {}).values()]
    registered = [t for part in parts for t in (*part.parameters(False), *part.buffers(False))]
    return sorted(t.data_ptr() for t in (*frozen, *registered))


def plain_copy(model: nn.Module, *, dtype: torch.dtype, channels_last: bool, together: bool) -> Callable[[], None]:
    """The floor of an update: every parameter copied in place into its own tensor of the layout that is used.

    Args:
        model: whose parameters.
        dtype: of what is copied into.
        channels_last: whether four-dimensional tensors are laid out so.
        together: by one call for all, instead of one for each.
    """
    sources = [p.detach() for p in model.parameters()]
    layouts = [torch.channels_last if channels_last and p.ndim == 4 else torch.contiguous_format for p in sources]
    targets = [
        torch.empty_like(p, dtype=dtype, memory_format=layout) for p, layout in zip(sources, layouts, strict=True)
    ]

    def copy() -> None:
        with torch.no_grad():
            if together:
                torch._foreach_copy_(targets, sources)
                return
            for source, target in zip(sources, targets, strict=True):
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
            f"plain copy, {name}, channels-last": plain_copy(model, dtype=dtype, channels_last=True, together=False),
            f"plain copy, {name}, contiguous": plain_copy(model, dtype=dtype, channels_last=False, together=False),
        }
        if device.type == "cuda":
            together = plain_copy(model, dtype=dtype, channels_last=True, together=True)
            copies[f"plain copy, {name}, channels-last, one call"] = together
        ways[f"update(), {name}"] = Way(fast.update, change)
        ways.update({copy: Way(run, change) for copy, run in copies.items()})
    ways["trace, fold, freeze, lay out again"] = Way(recipe.update, change)
    before = {dtype: tensor_addresses(fast) for dtype, fast in fasts.items()}
    timings = measure_in_turn(ways, device=device, repeats=repeats, warmup=2)
    unchanged = all(tensor_addresses(fast) == before[dtype] for dtype, fast in fasts.items())
    floors = {short(d): timings[f"plain copy, {short(d)}, channels-last"].median for d in dtypes}
    rows = []
    for way, timing in timings.items():
        dtype_name = next((name for name in floors if f", {name}" in way), short(torch.float32))
        rows.append((way, milliseconds(timing), f"{timing.median / floors[dtype_name]:.2f}x"))
    table = Table(
        f"Update of a WRN-{depth}-{width} after a change of all weights",
        ("way", "ms, median (quartiles)", "to the plain copy"),
        rows,
        "The plain copy is that into channels-last, in the same dtype. The addresses of all "
        f"{len(before[torch.float32])} tensors are {'unchanged' if unchanged else 'CHANGED'} by update().",
    )
    record = {
        "timings": {way: timing_record(timing) for way, timing in timings.items()},
        "to_plain_copy": {name: timings[f"update(), {name}"].median / floor for name, floor in floors.items()},
        "addresses_unchanged": unchanged,
    }
    return Part([table], record)
