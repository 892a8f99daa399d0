"""How long every way to run the same attack takes, what it keeps in memory, and what each trick brings.

`python -m benchmarks.speed` runs the parts that `parts` lists, each on the networks of `cases`, and `limits` holds what
they found against what this project aims at. `python -m benchmarks.speed.convolutions` measures convolutions alone,
`python -m benchmarks.speed.keeping` what is kept for the backward pass.
"""
