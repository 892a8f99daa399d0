"""How far a share of some samples may be from that of all."""

import math

_Z = 1.959963984540054  # of the normal distribution, two-sided, 95 %


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953."""
    share, square = successes / count, _Z**2 / count
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / count / 4)
    return (middle - half if successes else 0.0), (middle + half if successes < count else 1.0)
