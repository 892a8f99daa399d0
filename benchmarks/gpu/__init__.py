"""A GPU taken apart in stages: what it is, whether attacks are right on it, and where their time goes.

`python -m benchmarks.gpu.stages --stages smoke` runs one of them: env (`environment`), smoke, time (`steps`), profile
(`kernels`), micro (`operators`), compile (`compiling`), prepared. Each is a list of `items`, which are tried one by one
and written one by one. `clock` measures on the device.
"""
