"""Which instructions the processor has: which of several kernels is the fastest depends on it."""

import platform
from pathlib import Path

import torch


def _has(name: str) -> bool:
    # Private in torch up to 2.13; where a version lacks one, what is run instead is right and only slower.
    return bool(getattr(torch.cpu, name, lambda: False)())


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return "Intel" in platform.processor()


HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Vectors of 16 numbers in float32."""

HAS_AVX512_BF16 = _has("_is_avx512_bf16_supported")
"""Products of bfloat16, in vectors. Processors with AMX have them, too."""

HAS_AMX = _has("_is_amx_tile_supported")
"""Products of bfloat16, in tiles: several times as fast as those in vectors, if they are large."""

HAS_FAST_MKL = torch.backends.mkl.is_available() and _is_intel()
"""Matrix products of MKL at their best: on processors of others they take twice as long."""
