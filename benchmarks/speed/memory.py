"""Memory: what a forward pass keeps for the backward pass, what a GPU holds at most, and whether it grows."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.shared.networks import resnet18, settle_statistics
from benchmarks.shared.recipe import RecipeModel
from benchmarks.shared.report import Part, Table
from benchmarks.shared.rows import Prepared, short
from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import reason
from fastadv_adapters.comparison.memory import bytes_kept
from fastadv_adapters.modules.precision import HALF

Storages = dict[int, tuple[int, Tensor]]
"""Address of a piece of memory to its bytes, and a tensor that keeps it from being used again."""


def kept_per_image(prepared: Prepared, x: Tensor) -> float:
    """Bytes per image that a forward pass keeps for the backward pass, each piece of memory counted once.

    Two passes are made at once: what both keep are weights, which are not counted.
    """
    first, graph = _kept(prepared, x)
    second, other_graph = _kept(prepared, x)
    del graph, other_graph
    return sum(size for place, (size, _) in first.items() if place not in second) / len(x)


def _kept(prepared: Prepared, x: Tensor) -> tuple[Storages, Tensor]:
    found: Storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with prepared.context(), saved_tensors_hooks(pack, lambda tensor: tensor):
        return found, prepared.network(x.detach().clone().requires_grad_())


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_above(before: int, device: torch.device, run: Callable[[], object]) -> int | None:
    """Most bytes that tensors hold on a GPU during a run, beyond those held before; None elsewhere."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def held(device: torch.device) -> int | None:
    """Bytes held now: by tensors on a GPU, by the whole process on a CPU; None where that is not told."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    source = Path("/proc/self/statm")
    return int(source.read_text().split()[1]) * 4096 if source.exists() else None


def memory_part(device: torch.device, *, width: int, batch: int) -> Part:
    """Bytes kept for the backward pass, in every dtype and by type of layer, on a ResNet-18.

    It counts, so a processor may be slow at half precision: forward passes on few images tell. What is kept once per
    batch, weights that are cast in every pass say, would count too much there: twice the images take it out.
    """
    x = torch.rand(2 * batch, 3, 32, 32, device=device)
    model = settle_statistics(resnet18(width=width).to(device), x)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    recipes = {f"recipe, {short(d)}": RecipeModel(model, dtype=d if d in HALF else None) for d in dtypes}
    fasts = {f"ours, {short(d)}": FastAttackModel(model, dtype=d, engine="eager") for d in dtypes}
    kept: dict[str, float] = {}
    layers: dict[str, dict[str, float]] = {"plain": bytes_kept(model, x).by_layer}
    failures: dict[str, str] = {}
    for name, network in {"plain": model, **recipes, **fasts}.items():
        try:
            prepared = Prepared(lambda x, y: x, network)
            prepared.network(x.clone().requires_grad_())  # what is looked at once, at the first call, keeps nothing
            kept[name] = 2 * kept_per_image(prepared, x) - kept_per_image(prepared, x[:batch])
            if isinstance(network, FastAttackModel):
                layers[name] = bytes_kept(network, x).by_layer
        except Exception as error:
            failures[name] = reason(error)
    return Part([_memory_table(kept, layers, failures, width)], {"bytes": kept, "layers": layers, "failures": failures})


def _memory_table(
    kept: dict[str, float], layers: dict[str, dict[str, float]], failures: dict[str, str], width: int
) -> Table:
    rows = [
        (name, f"{size / 1e6:.3f}", f"{size / kept['plain']:.0%}", _by_layer(layers.get(name, {})))
        for name, size in kept.items()
    ]
    rows += [(name, "", "", why) for name, why in failures.items()]
    return Table(
        f"Bytes kept for the backward pass, ResNet-18 of width {width}",
        ("way", "MB per further image", "of plain", "by type of layer"),
        rows,
        "Each piece of memory is counted once, weights are not. Types of layers are found on a throw-away copy of the "
        "network. PostActivationBlock is the benchmark's residual block, here its last ReLU.",
    )


def _by_layer(layers: dict[str, float]) -> str:
    total = sum(layers.values())
    return ", ".join(f"{name} {size / total:.0%}" for name, size in layers.items() if size >= total / 100)
