"""SNIP: pruned before any training, at 90, 95 and 98 %.

    python examples/pruning/snip.py

SNIP (Lee et al. 2019) against the same share of every layer chosen at random (the sanity check of
Frankle et al. 2021, arXiv:2009.08576) and against random and magnitude pruning of the untrained
network, on LeNet-300-100; against random pruning on LeNet-5.
"""

from catalog import DENSE, SNIP_CNN, SNIP_MLP
from frame import run
from lines import experiment

GROUPS = {"LeNet-300-100": SNIP_MLP, "LeNet-5": SNIP_CNN}
EXPERIMENT = experiment([DENSE, *SNIP_MLP, *SNIP_CNN])

if __name__ == "__main__":
    run(EXPERIMENT, __doc__)
