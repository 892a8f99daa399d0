"""Benchmarks: how fast, and how right, each way of running the same attack is.

`speed` times the ways, `precision` and `matrix` judge whether they are right, `attack` compares SafePGD with other
attacks, `gpu` takes a GPU apart in stages, and `shared` is what these use. `quote` puts the tables that they write into
the docs.
"""

import sys
from pathlib import Path

# The digits and their network are the examples' own; those are scripts, not a package.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
