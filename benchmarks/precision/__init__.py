"""How right attacks in half precision are: gradients that vanish, their direction, and robust accuracy.

`python -m benchmarks.precision` trains the networks of `subjects` until they are confident, and attacks them in the
ways of `ways`. `python -m benchmarks.precision.truth` attacks models as people write them.
"""
