"""What every benchmark uses: the networks and the ways to attack them, the clock, the judgement, and the report.

A `Row` of `rows` is a way to attack, `recipe` is the one that users write by hand, `networks` are attacked. `timing`
measures ways in turn, `correctness` judges them, `report` writes what was found, and `device` says on what.
"""
