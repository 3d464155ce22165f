"""Random bad input, as long as one likes: `make fuzz`, with TARGET=, SEED= and SECONDS=.

Each target makes case number i from (target, seed, i) alone, so that a finding can be run again:
`python -m fuzz --target calls --seed 0 --case 17`.
"""
