"""Numbers, shapes and requirements as they are written on a command line."""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def number(text: str) -> float:
    """A number, or a fraction such as ``8/255``."""
    above, slash, below = text.partition("/")
    try:
        value = float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"expected a number or a fraction, got {text!r}: write 0.03 or 8/255, say")
    return value


def numbers(text: str) -> list[float]:
    """Several numbers with commas between."""
    return [number(part.strip()) for part in text.split(",")]


def bounds(text: str) -> tuple[float, float]:
    """The least and the largest value of an image."""
    found = numbers(text)
    if len(found) != 2:
        raise ValueError(f"expected two numbers as bounds, got {text!r}: write 0,1, say")
    return found[0], found[1]


def shape(text: str) -> tuple[int, ...]:
    """The shape of one image, ``3x32x32``."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise ValueError(f"expected the shape of one image as input, got {text!r}: write 3x32x32, say")
    return tuple(int(part) for part in text.split("x"))


@dataclass(frozen=True)
class Requirement:
    """What a report has to reach, such as ``robust>=0.4``."""

    text: str
    attribute: str
    relation: Callable[[float, float], bool]
    limit: float

    def holds(self, report: Any) -> bool:
        """Whether it does."""
        return self.relation(getattr(report, self.attribute), self.limit)


def requirement(text: str) -> Requirement:
    """Read a requirement."""
    found = re.fullmatch(r"\s*(robust|clean)(?:_accuracy)?\s*(>=|>)\s*(\S+)\s*", text)
    if found is None:
        raise ValueError(f"expected a requirement on robust or clean accuracy, got {text!r}: write 'robust>=0.4', say")
    limit = number(found[3])
    if not 0 <= limit <= 1:
        raise ValueError(f"expected a requirement between 0 and 1, got {text!r}: write a share, 'robust>=0.4', say")
    return Requirement(text, f"{found[1]}_accuracy", operator.ge if found[2] == ">=" else operator.gt, limit)
