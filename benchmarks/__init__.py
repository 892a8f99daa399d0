"""Benchmarks: how fast, and how right, each way of running the same attack is."""

import sys
from pathlib import Path

# The digits and their network are the examples' own; those are scripts, not a package.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
