"""The table of sample inputs: op name -> list of samples. test_ops.py runs every check on each.

A new op adds one entry here. A sample builds its arguments for a device and dtype; arguments that
take part in gradients come first in `grads`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsekern.ops.block import split_blocks
from sparsekern.ops.conv import output_size
from sparsekern.ops.nm import pack_index


@dataclass(frozen=True)
class Sample:
    id: str
    build: Callable  # (dtype) -> tuple of arguments
    nnz_per_row: int  # longest sum, for the tolerance
    grads: tuple[int, ...]  # positions of the differentiable arguments
    uneven: bool = False  # padding of four integers, which some kernels are never given


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


def random_blocks(rows, channels, block, sparsity, groups=1, taps=1):
    """Parts of a block weight: values, crow, col. Not by the weight class, which has its tests."""
    weight = torch.randn(rows, channels, taps, dtype=torch.float64)
    grid = split_blocks(weight, block, groups)
    kept = (torch.rand(grid.shape[:3]) >= sparsity).flatten(1)
    crow = torch.zeros(kept.shape[0] + 1, dtype=torch.int32)
    crow[1:] = kept.sum(1).cumsum(0)
    return grid.flatten(1, 2)[kept], crow, kept.nonzero()[:, 1].to(torch.int32)


def random_nm(rows, channels, n, m, taps=1):
    """Parts of an N:M weight: values, index."""
    sizes = [min(m, channels - first) for first in range(0, channels, m)]
    chosen = [torch.rand(rows, taps, size).argsort(2)[..., :n].sort(2).values for size in sizes]
    index = pack_index(torch.stack(chosen, 1).flatten(1), m)
    return torch.randn(rows, len(sizes) * taps * n, dtype=torch.float64), index


def _other_linear(tokens, cols, rows, parts, plan_op, sizes, tail, *, bias=True, plan=True, act):
    """A linear sample of a format: `parts()` gives values and indices, `tail` follows the plans."""

    def build(dtype):
        torch.manual_seed(0)
        values, *index = parts()
        shape = tokens if isinstance(tokens, tuple) else (tokens,)
        x = torch.randn(*shape, cols, dtype=torch.float64).to(dtype)
        b = torch.randn(rows, dtype=torch.float64).to(dtype) if bias else None
        plans = [plan_op(*index, *sizes, 1, 1, t) if plan else None for t in (False, True)]
        return x, values.to(dtype), *index, b, *plans, *tail, act

    return build


def _block(tokens, cols, rows, block, sparsity, *, bias=True, act="none", plan=True):
    op = torch.ops.sparsekern.block_plan
    build = _other_linear(
        tokens, cols, rows, lambda: random_blocks(rows, cols, block, sparsity), op,
        (rows, cols, *block), (rows,), bias=bias, plan=plan, act=act,
    )  # fmt: skip
    name = f"T{tokens}-K{cols}-M{rows}-{block[0]}x{block[1]}-s{sparsity}-{act}-{bias}-{plan}"
    return Sample(name.replace(" ", ""), build, max(1, cols), (0, 1, 4) if bias else (0, 1))


def _nm(tokens, cols, rows, n, m, *, bias=True, act="none", plan=True):
    op = torch.ops.sparsekern.nm_plan
    build = _other_linear(
        tokens, cols, rows, lambda: random_nm(rows, cols, n, m), op, (rows, cols, n, m), (n, m),
        bias=bias, plan=plan, act=act,
    )  # fmt: skip
    name = f"T{tokens}-K{cols}-M{rows}-{n}of{m}-{act}-{bias}-{plan}"
    return Sample(name.replace(" ", ""), build, max(1, cols), (0, 1, 3) if bias else (0, 1))


def _is_uneven(padding) -> bool:
    return not isinstance(padding, int) and len(padding) == 4


def _other_conv(n, c, size, out, kernel, block=None, nm=None, sparsity=0.5, *, stride=1, padding=0,
                dilation=1, groups=1, bias=True, act="none", plan=True):  # fmt: skip
    """A convolution in blocks (`block=(R, C)`) or N:M (`nm=(n, m)`)."""
    taps, channels = kernel * kernel, c // groups

    def build(dtype):
        torch.manual_seed(0)
        if block:
            values, *index = random_blocks(out, channels, block, sparsity, groups, taps)
            plan_op, sizes, tail = torch.ops.sparsekern.block_plan, (out, channels, *block), (out,)
        else:
            values, *index = random_nm(out, channels, *nm, taps)
            plan_op, sizes, tail = torch.ops.sparsekern.nm_plan, (out, channels, *nm), nm
        x = torch.randn(n, c, *size, dtype=torch.float64).to(dtype)
        b = torch.randn(out, dtype=torch.float64).to(dtype) if bias else None
        plans = [plan_op(*index, *sizes, groups, taps, t) if plan else None for t in (False, True)]
        geometry = [[v, v] if isinstance(v, int) else list(v)
                    for v in (kernel, stride, padding, dilation)]  # fmt: skip
        return x, values.to(dtype), *index, b, *plans, *tail, *geometry, groups, act

    last = 4 if block else 3
    name = (
        f"N{n}-C{c}-O{out}-{size}-k{kernel}-s{stride}-p{padding}-d{dilation}-g{groups}"
        f"-{block or nm}-{sparsity}-{act}-{bias}-{plan}"
    ).replace(" ", "")
    grads = (0, 1, last) if bias else (0, 1)
    return Sample(name, build, taps * channels, grads, _is_uneven(padding))


def _conv(n, c, size, out, kernel, sparsity, *, stride=1, padding=0, dilation=1, groups=1,
          bias=True, act="none", plan=True, residual=False):  # fmt: skip
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
        geometry = tuple(map(pair, (kernel, stride, padding, dilation)))
        more = ()
        if residual:
            shape = (n, out, *output_size(x.shape[2:], *geometry))
            more = (torch.randn(shape, dtype=torch.float64).to(dtype),)
        return x, values.to(dtype), crow, col, b, *plans, *geometry, groups, act, *more

    name = (
        f"N{n}-C{c}-O{out}-{size}-k{kernel}-s{stride}-p{padding}-d{dilation}-g{groups}-{sparsity}"
        f"-{act}{'' if bias else '-nobias'}{'' if plan else '-noplan'}{'-residual' * residual}"
    ).replace(" ", "")
    grads = (0, 1, *((4,) if bias else ()), *((13,) if residual else ()))
    return Sample(name, build, 9 * c // groups, grads, _is_uneven(padding))


def _few(rows, cols, sparsity, **options):
    """Every number of tokens that the kernels for few tokens tell apart."""
    return [_linear(tokens, cols, rows, sparsity, **options) for tokens in (1, 2, 3, 6, 9, 14)]


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
    _linear(80, 200, 40, 0.8, act="relu6"),
    _linear(2, 200, 40, 0.8, act="relu6"),
    _linear(130, 520, 1, 0.9),
    _linear(40, 1, 17, 0.3),
    _linear(33, 50, 40, 1.0),
    _linear(129, 700, 1030, 0.98, kind="skewed"),
    # few tokens: a bitmap and 16-bit columns, with and without columns behind the last full word
    *_few(21, 192, 0.4, kind="skewed", act="relu"),
    *_few(37, 131, 0.5, bias=False),
    *_few(18, 211, 0.93, kind="skewed"),
    _linear(1, 17000, 3, 0.9),  # two blocks of columns
    _linear(1, 6500, 11, 0.95, kind="skewed", act="relu"),  # x wider than L1: rows side by side
    _linear(1, 6500, 9, 0.95, bias=False),
    _linear(5, 70000, 2, 0.99, kind="skewed"),  # wider than 16 bits
    _linear(2, 70000, 2, 0.5),
    _linear(33, 211, 18, 0.93),
    _linear(1, 64, 40, 1.0),
]

CONV = [
    _conv(2, 6, 14, 8, 3, 0.7, padding=1),
    _conv(1, 4, (9, 11), 6, 3, 0.5, stride=2, padding=1, act="relu"),
    _conv(1, 6, (40, 37), 9, (5, 3), 0.6, stride=(2, 3), padding=(2, 0), dilation=(1, 2), groups=3),
    _conv(3, 5, 8, 7, 1, 0.8),
    _conv(1, 24, 16, 12, 3, 0.6, padding=1, act="relu6"),
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
    # few values per column, rows that fill vectors: straight from shifted copies of the image
    _conv(2, 24, 14, 20, 3, 0.8, padding=1, act="relu"),
    _conv(1, 40, (30, 28), 36, 3, 0.9, padding=1, act="gelu"),
    _conv(1, 16, (29, 55), 8, 3, 0.7, stride=2, padding=1),
    _conv(2, 12, (17, 62), 12, 5, 0.8, padding=2, dilation=1, groups=2, act="relu6"),
    _conv(1, 6, (10, 47), 6, (1, 3), 0.5, stride=(1, 3), dilation=(1, 2)),
    _conv(2, 64, 16, 24, 1, 0.8, act="relu"),
    _conv(1, 33, (8, 18), 9, 1, 0.7, act="gelu_tanh"),
    _conv(1, 20, (28, 56), 40, 1, 0.8, stride=2),
    # a residual, added where rows are stored at once, from sums, and from lines
    _conv(1, 24, (16, 16), 20, 1, 0.5, residual=True),
    _conv(3, 12, (7, 5), 30, 3, 0.3, padding=1, act="relu6", residual=True),
    _conv(2, 16, 16, 9, 3, 0.8, padding=1, act="relu", residual=True),
    _conv(1, 16, (9, 29), 9, 3, 0.8, padding=1, act="gelu", residual=True, bias=False),
    # depthwise: all taps of a kernel of 3 or 5 straight from the image, others from a padded plane
    _conv(2, 6, (9, 7), 6, 3, 0.0, padding=1, groups=6, act="relu6"),
    _conv(1, 5, (37, 50), 10, 3, 0.0, stride=2, padding=1, groups=5, residual=True, act="relu"),
    _conv(1, 4, (35, 18), 4, 5, 0.0, padding=2, groups=4, act="gelu", bias=False),
    _conv(1, 3, (40, 39), 3, 5, 0.0, stride=2, padding=(3, 0), groups=3, plan=False),
    _conv(2, 4, (20, 33), 8, 3, 0.4, padding=1, groups=4, act="gelu_tanh", residual=True),
    _conv(1, 3, (16, 40), 3, (3, 5), 0.2, stride=(1, 2), padding=(1, 4), dilation=2, groups=3),
    # zeros that differ from side to side: (top, left, bottom, right)
    _conv(2, 6, (14, 18), 8, 3, 0.6, stride=2, padding=(0, 0, 1, 1), act="relu"),
    _conv(2, 5, (9, 33), 7, (4, 2), 0.5, padding=(1, 0, 2, 1), residual=True),
    _conv(1, 6, (40, 38), 6, 3, 0.0, stride=2, padding=(0, 0, 1, 1), groups=6, act="relu6"),
    _conv(1, 4, (30, 21), 4, 5, 0.0, padding=(0, 3, 4, 1), groups=4, bias=False),
    _conv(1, 16, (28, 28), 12, 3, 0.9, padding=(2, 0, 0, 2), residual=True, act="gelu"),
    _conv(1, 3, (2, 3), 3, 3, 0.0, padding=4, groups=3),
]

BLOCK = [
    _block(0, 8, 8, (4, 4), 0.5),
    _block(1, 64, 40, (16, 16), 0.5),
    _block(2, 50, 19, (16, 1), 0.5, act="relu"),
    _block(1, 50, 19, (5, 3), 0.5),
    _block(3, 37, 53, (16, 16), 0.6, plan=False),
    _block(16, 32, 32, (32, 32), 0.0),
    _block(17, 129, 65, (1, 8), 0.7, act="gelu"),
    _block(100, 65, 31, (4, 4), 0.6, act="gelu_tanh"),
    _block((2, 3, 5), 20, 12, (2, 6), 0.5, bias=False),
    _block((2, 0), 20, 12, (4, 4), 0.5),
    _block(40, 1, 17, (8, 1), 0.3),
    _block(33, 50, 40, (8, 8), 1.0),
    _block(70, 1100, 530, (16, 16), 0.9),
    _block(70, 120, 30, (4, 4), 0.5, act="relu6"),
]
NM = [
    _nm(0, 8, 8, 2, 4),
    _nm(1, 100, 33, 2, 4),
    _nm(2, 132, 7, 4, 8, act="relu"),
    _nm(1, 60, 9, 3, 7),
    _nm(3, 38, 21, 2, 4, plan=False),
    _nm(16, 32, 16, 8, 16),
    _nm(17, 131, 65, 2, 4, act="gelu"),
    _nm(100, 64, 31, 1, 4, act="gelu_tanh"),
    _nm((2, 3, 5), 20, 12, 1, 2, bias=False),
    _nm((2, 0), 20, 12, 2, 4),
    _nm(130, 300, 530, 2, 4),
    _nm(33, 15, 4, 5, 9),
    _nm(20, 128, 40, 2, 4, act="relu6"),
]
BLOCK_CONV = [
    _other_conv(2, 6, (9, 14), 8, 3, (4, 4), padding=1),
    _other_conv(1, 4, (9, 11), 6, 3, (3, 2), stride=2, padding=1, act="relu"),
    _other_conv(1, 6, (12, 9), 9, 3, (3, 2), groups=3, dilation=2, bias=False),
    _other_conv(3, 5, (8, 8), 7, 1, (16, 16), sparsity=0.0),
    _other_conv(0, 4, (8, 8), 4, 3, (2, 2), padding=1),
    _other_conv(1, 3, (7, 7), 4, 3, (2, 2), sparsity=1.0, act="gelu"),
    _other_conv(2, 20, (14, 14), 33, 3, (16, 1), padding=1, plan=False),
    _other_conv(1, 6, (10, 13), 8, 3, (4, 2), stride=2, padding=(0, 1, 1, 0), act="relu"),
]
NM_CONV = [
    _other_conv(2, 8, (9, 14), 6, 3, nm=(2, 4), padding=1),
    _other_conv(1, 7, (9, 11), 6, 3, nm=(1, 2), stride=2, padding=1, act="relu"),
    _other_conv(1, 12, (12, 9), 9, 3, nm=(2, 4), groups=3, dilation=2, bias=False),
    _other_conv(3, 16, (8, 8), 7, 1, nm=(4, 16)),
    _other_conv(0, 4, (8, 8), 4, 3, nm=(2, 4), padding=1),
    _other_conv(1, 20, (7, 7), 5, 3, nm=(3, 8), plan=False, act="gelu"),
    _other_conv(2, 8, (10, 13), 6, 3, nm=(2, 4), stride=2, padding=(0, 1, 1, 0)),
]

SAMPLES = {
    "csr_linear": LINEAR,
    "csr_conv2d": CONV,
    "block_linear": BLOCK,
    "block_conv2d": BLOCK_CONV,
    "nm_linear": NM,
    "nm_conv2d": NM_CONV,
}
