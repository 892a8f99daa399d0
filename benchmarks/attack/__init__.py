"""How strong SafePGD is: as an attack beside others, and as the inner maximiser of a training loss.

`strength` attacks the `networks` in the ways of `attacks`, keeps what it finds in `cells` and writes a page; `trades`
trains with it; `training` compares training on plain and on fast models (`curves` draws it); `cycles` counts what it
saves by stopping in cycles; `autoattack` runs AutoAttack itself; `evaluating` counts the passes of `evaluate`, kills it
again and again, and compares it with the reference. Run them with
`python -m benchmarks.attack.strength` and so on.
"""
