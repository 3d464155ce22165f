"""What the tests of all ops on all samples share."""

import pytest
import torch
from samples import SAMPLES
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern  # noqa: F401  (defines the ops)

OPS = {name: getattr(torch.ops.sparsekern, name).default for name in SAMPLES}

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
