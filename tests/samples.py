"""The table of sample inputs: op name -> list of samples. test_ops.py runs every check on each.

A new op adds one entry here. A sample builds its arguments for a device and dtype; arguments that
take part in gradients come first in `grads`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sample:
    id: str
    build: Callable  # (dtype) -> tuple of arguments
    nnz_per_row: int  # longest sum, for the tolerance
    grads: tuple[int, ...]  # positions of the differentiable arguments


def csr_of(weight: torch.Tensor):
    """CSR parts of a (rows, cols) matrix without torch's sparse layouts."""
    kept = weight != 0
    crow = torch.zeros(weight.shape[0] + 1, dtype=torch.int32)
    crow[1:] = kept.sum(1).cumsum(0)
    return weight[kept], crow, kept.nonzero()[:, 1].to(torch.int32)


def random_weight(rows: int, cols: int, sparsity: float, kind: str = "uniform") -> torch.Tensor:
    weight = torch.randn(rows, cols, dtype=torch.float64)
    kept = torch.rand(rows, cols) >= sparsity
    if kind == "skewed":  # a few full rows and columns, many empty ones
        kept &= (torch.rand(rows, 1) < 0.5) & (torch.rand(1, cols) < 0.5)
        if rows and cols:
            kept[0], kept[:, cols - 1] = True, True
    return weight * kept


def _linear(tokens, cols, rows, sparsity, *, bias=True, act="none", plan=True, kind="uniform"):
    def build(dtype):
        torch.manual_seed(0)
        values, crow, col = csr_of(random_weight(rows, cols, sparsity, kind))
        shape = tokens if isinstance(tokens, tuple) else (tokens,)
        x = torch.randn(*shape, cols, dtype=torch.float64).to(dtype)
        b = torch.randn(rows, dtype=torch.float64).to(dtype) if bias else None
        plans = (None, None)
        if plan:
            args, pairs = (crow, col, cols, 1, 1), dtype == torch.bfloat16
            plans = tuple(torch.ops.sparsekern.csr_plan(*args, t, pairs and not t)
                          for t in (False, True))  # fmt: skip
        return x, values.to(dtype), crow, col, b, *plans, act

    grads = (0, 1, 4) if bias else (0, 1)
    text = "x".join(map(str, tokens)) if isinstance(tokens, tuple) else str(tokens)
    flags = f"{kind}-{act}{'' if bias else '-nobias'}{'' if plan else '-noplan'}"
    name = f"T{text}-K{cols}-M{rows}-s{sparsity}-{flags}"
    return Sample(name, build, max(1, round(cols * (1 - sparsity))), grads)


def _conv(n, c, size, out, kernel, sparsity, *, stride=1, padding=0, dilation=1, groups=1,
          bias=True, act="none", plan=True):  # fmt: skip
    def pair(v):
        return [v, v] if isinstance(v, int) else list(v)

    def build(dtype):
        torch.manual_seed(0)
        kh, kw = pair(kernel)
        cols, taps = c // groups * kh * kw, kh * kw
        values, crow, col = csr_of(random_weight(out, cols, sparsity))
        x = torch.randn(n, c, *pair(size), dtype=torch.float64).to(dtype)
        b = torch.randn(out, dtype=torch.float64).to(dtype) if bias else None
        plans = (None, None)
        if plan:
            args = (crow, col, cols, groups, taps)
            plans = tuple(torch.ops.sparsekern.csr_plan(*args, t) for t in (False, True))
        geometry = (pair(kernel), pair(stride), pair(padding), pair(dilation), groups)
        return x, values.to(dtype), crow, col, b, *plans, *geometry, act

    name = (
        f"N{n}-C{c}-O{out}-{size}-k{kernel}-s{stride}-p{padding}-d{dilation}-g{groups}-{sparsity}"
        f"-{act}{'' if bias else '-nobias'}{'' if plan else '-noplan'}"
    ).replace(" ", "")
    return Sample(name, build, 9 * c // groups, (0, 1, 4) if bias else (0, 1))


LINEAR = [
    _linear(0, 8, 8, 0.5),
    _linear(1, 64, 33, 0.5),
    _linear(2, 100, 7, 0.7, act="relu"),
    _linear(3, 37, 53, 0.7, plan=False),
    _linear(15, 40, 24, 0.8),
    _linear(16, 16, 16, 0.0),
    _linear(17, 129, 65, 0.9, act="gelu"),
    _linear(100, 65, 31, 0.6, act="gelu_tanh"),
    _linear((2, 3, 5), 20, 12, 0.5, bias=False),
    _linear((2, 0), 20, 12, 0.5),
    _linear(197, 300, 70, 0.95, kind="skewed", act="relu"),
    _linear(130, 520, 1, 0.9),
    _linear(40, 1, 17, 0.3),
    _linear(33, 50, 40, 1.0),
    _linear(129, 700, 1030, 0.98, kind="skewed"),
]

CONV = [
    _conv(2, 6, 14, 8, 3, 0.7, padding=1),
    _conv(1, 4, (9, 11), 6, 3, 0.5, stride=2, padding=1, act="relu"),
    _conv(1, 6, (40, 37), 9, (5, 3), 0.6, stride=(2, 3), padding=(2, 0), dilation=(1, 2), groups=3),
    _conv(3, 5, 8, 7, 1, 0.8),
    _conv(1, 8, 12, 8, 3, 0.4, padding=1, groups=8, bias=False),
    _conv(2, 4, 33, 5, 3, 0.5, stride=2, padding=1, plan=False),
    _conv(0, 4, 8, 4, 3, 0.5, padding=1),
    _conv(1, 3, 7, 4, 7, 1.0, padding=3, act="gelu"),
    _conv(1, 2, 40, 3, 3, 0.0, stride=3, dilation=2),
    # image rows shorter than a vector, ending at the edge of a panel
    _conv(2, 8, (14, 12), 12, 4, 0.5),
    _conv(3, 3, (9, 4), 5, 3, 0.3, padding=1),
    _conv(2, 16, 9, 8, 3, 0.5, padding=1),
    _conv(1, 2, (70, 1), 4, (3, 1), 0.3, padding=(1, 0)),
]

SAMPLES = {"csr_linear": LINEAR, "csr_conv2d": CONV}
