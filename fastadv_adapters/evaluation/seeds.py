"""Random numbers that depend on the sample and the attack, and on nothing else."""

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..modules import random_state_kept


def seed_of(*parts: object) -> int:
    """A seed below 2^62 for these parts: the caller's seed, an attack, a sample, a start."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 2


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """All generators begin at this seed inside, and are as before afterwards."""
    with random_state_kept(device):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy: Any = sys.modules.get("numpy")
        if numpy:
            numpy.random.seed(seed % 2**32)
        yield
