"""The matrix: every attack of torchattacks and foolbox on plain and fast models, and the page that tells how they did.

Run with `python -m benchmarks.matrix`. The tables of attacks are `torchattacks_rows.py` and `foolbox_rows.py`.
"""
