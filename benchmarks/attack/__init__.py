"""How strong SafePGD is: as an attack beside others, and as the inner maximiser of a training loss.

`strength` attacks the `networks` in the ways of `attacks`, keeps what it finds in `cells` and writes a page; `trades`
trains with it; `training` compares training on plain and on fast models (`curves` draws it); `training_mode` asks what
attacks in training mode bring; `cycles` counts what it saves by stopping in cycles; `autoattack` runs AutoAttack;
`evaluating` counts the passes of `evaluate`, kills it, and compares it with the reference. Run them with
`python -m benchmarks.attack.strength` and so on.
"""
