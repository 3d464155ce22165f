"""Sparse from start to end: RigL against SET, fixed masks, and a small dense network.

    python examples/pruning/rigl.py

Evci et al. 2020 (arXiv:1911.11134), table 2 in small: masks drawn at random that stay (static),
that change at random (SET) or by the gradient (RigL), with the same share in every layer or by the
Erdos-Renyi-kernel rule; gradual magnitude pruning, which trains densely at first, for comparison.
"""

from catalog import DENSE, DYNAMIC
from frame import run
from lines import experiment

GROUPS = {"sparse from start to end": DYNAMIC}
EXPERIMENT = experiment([DENSE, *DYNAMIC])

if __name__ == "__main__":
    run(EXPERIMENT, __doc__)
