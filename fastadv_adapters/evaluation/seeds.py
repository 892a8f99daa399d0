"""Random numbers that depend on the sample and the attack, and on nothing else."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..modules import random_state_kept, seed_generators


def seed_of(*parts: object) -> int:
    """A seed below 2^62 for these parts: the caller's seed, an attack, a sample, a start."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 2


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """All generators begin at this seed inside, and are as before afterwards."""
    with random_state_kept(device):
        seed_generators(seed, device)
        yield
