"""Large and sparse, or small and dense: the comparison of gradual magnitude pruning.

    python examples/pruning/gradual.py

Zhu & Gupta 2017 (arXiv:1710.01878): a network pruned to a share of its weights while it trains
against a dense network of as many weights, trained as long.
"""

from catalog import DENSE, GRADUAL, GRADUAL_GLOBAL, SMALL
from frame import run
from lines import experiment

GROUPS = {"large and sparse, or small and dense": (GRADUAL, GRADUAL_GLOBAL, SMALL)}
EXPERIMENT = experiment([DENSE, GRADUAL, GRADUAL_GLOBAL, SMALL], sparsities=[0.75, 0.9, 0.95, 0.98])

if __name__ == "__main__":
    run(EXPERIMENT, __doc__)
