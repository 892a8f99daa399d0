"""What there is: devices, versions, extras, and what ``auto`` would choose here."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..comparison import describe_device, versions
from ..model import FastAttackModel

EXTRAS = {
    "torchattacks": ("torchattacks",),
    "foolbox": ("foolbox", "eagerpy"),
    "autoattack": ("pyautoattack",),
    "evaluate": ("matplotlib", "rich", "safetensors"),
    "cli": ("typer", "PIL"),
    "demo": ("sklearn",),
}
"""What an extra brings, by the names under which it is imported."""


def information() -> dict[str, Any]:
    """Everything, as JSON has it."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    missing = {extra: [name for name in names if find_spec(name) is None] for extra, names in EXTRAS.items()}
    return {
        "versions": versions(),
        "devices": {str(device): describe_device(device) for device in devices},
        "auto": {str(device): _chosen(device) for device in devices},
        "extras": {e: f"{', '.join(names)} not installed" if names else "there" for e, names in missing.items()},
    }


def _chosen(device: torch.device) -> dict[str, str]:
    """What a fast model of a middling convolutional network runs in after its first gradient pass."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        layers = nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()
        fast = FastAttackModel(
            nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).to(device)
        )
        x = torch.rand(16, 3, 32, 32, device=device, requires_grad=True)
    fast(x).logsumexp(1).sum().backward()
    return {"dtype": str(fast.dtype).removeprefix("torch."), "engine": fast.engine}
