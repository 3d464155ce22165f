"""Accuracy against sparsity, for every pruning method on one network.

    python examples/pruning/accuracy.py                    # resumes where it was stopped
    python examples/pruning/page.py                        # tables and figures of what there is

LeNet-300-100 on Fashion-MNIST, three seeds; ResNet-8 for the grains that only convolutions have.
Methods that prune a trained network get the same trained network and the same epochs after it;
methods that prune before or during training get the epochs of both. Random and layer-wise magnitude
pruning are the baselines.
"""

from catalog import AFTER, DENSE, GRAINS, SHAPED, START, WHOLE
from frame import run
from lines import experiment

GROUPS = {
    "pruned after training": AFTER,
    "pruned before or during training": START,
    "whole units, pruned after training": WHOLE,
    "patterns with fast kernels": SHAPED,
    "grains of a convolutional network, pruned after training": GRAINS,
}
EXPERIMENT = experiment([DENSE, *AFTER, *START, *WHOLE, *SHAPED, *GRAINS])

if __name__ == "__main__":
    run(EXPERIMENT, __doc__)
