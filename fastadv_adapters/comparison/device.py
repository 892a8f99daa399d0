"""What a reader needs to compare numbers: the device, and the versions of what ran on it."""

import importlib.metadata
import platform
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

REPORTED_PACKAGES = ("torch", "torchattacks", "foolbox", "eagerpy", "numpy", "pyautoattack")


def _processor() -> str:
    """The processor's marketing name; `platform` knows it on some systems only."""
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> dict[str, str]:
    """Driver and power limit, where nvidia-smi tells them."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return dict(zip(("driver", "power_limit"), map(str.strip, told[0].split(",")), strict=False)) if told else {}


def describe_device(device: torch.device) -> dict[str, str | int]:
    """Processor or GPU, its capability, threads or driver."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30),
            "cuda": str(torch.version.cuda),
            "cudnn": int(torch.backends.cudnn.version() or 0),
            **_driver(),
        }
    return {
        "type": device.type,
        "name": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those not installed left out."""
    found = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
