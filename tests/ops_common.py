"""What the tests of all ops on all samples share."""

import pytest
import torch
from samples import SAMPLES
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekern.ops import block, block_conv, conv, csr, nm, nm_conv

OPS = {
    "csr_linear": csr.csr_linear,
    "csr_conv2d": conv.csr_conv2d,
    "block_linear": block.block_linear,
    "block_conv2d": block_conv.block_conv2d,
    "nm_linear": nm.nm_linear,
    "nm_conv2d": nm_conv.nm_conv2d,
}

cases = [
    pytest.param(name, sample, id=f"{name}-{sample.id}")
    for name, samples in SAMPLES.items()
    for sample in samples
]
small = [
    case for case in cases if sum(a.numel() for a in case.values[1].build(torch.float64)[:2]) < 2500
]


def with_grads(arguments, positions):
    return [
        a.detach().clone().requires_grad_() if i in positions else a
        for i, a in enumerate(arguments)
    ]


class Calls(TorchDispatchMode):
    """Remembers the calls of our ops: name and arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "sparsekern":
            self.seen.append((op._schema.name.split("::")[1], args))
        return op(*args, **(kwargs or {}))
