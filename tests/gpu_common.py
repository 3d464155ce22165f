"""What the tests in `tests/gpu` share: how close is close, and outputs that nobody wrote."""

import torch

from sparsekern.ops import block, block_conv, conv, csr, nm, nm_conv
from sparsekern.ops.uneven import pad_first

OPS = {
    "csr_linear": (csr.csr_linear, csr._linear_reference),
    "csr_conv2d": (conv.csr_conv2d, conv._conv_reference),
    "block_linear": (block.block_linear, block._linear_reference),
    "block_conv2d": (block_conv.block_conv2d, block_conv._conv_reference),
    "nm_linear": (nm.nm_linear, nm._linear_reference),
    "nm_conv2d": (nm_conv.nm_conv2d, nm_conv._conv_reference),
}
OPS = {name: (op, pad_first(name, reference)) for name, (op, reference) in OPS.items()}
# ||got - want|| / ||want||. The products of 2:4 weights in float32 round their operands to TF32.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TF32 = 1e-3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_close(got, want, what="", slack=1.0, tf32=False, terms=1024):
    """Compare with an exact result in float64, as a whole and element by element.

    `terms` is the length of the longest sum: its rounding grows like the square root.
    """
    assert got.shape == want.shape, (what, got.shape, want.shape)
    if not want.numel():
        return
    limit = TF32 if tf32 and got.dtype == torch.float32 else CLOSE[got.dtype]
    limit = slack * (limit + 1.2e-7 * terms**0.5)
    gap = got.detach().cpu().double() - want
    size = max(float(want.norm()), 1e-30)
    assert float(gap.norm()) <= limit * size, (what, float(gap.norm()) / size, limit)
    # No element may be off by far more than the others: a tile that was left out, say.
    assert float(gap.abs().max()) <= 20 * limit * max(float(want.abs().max()), 1e-30), what


def poison(shape, dtype):
    """Leave NaN where the allocator will put an output of this shape, should nobody write it."""
    torch.full(tuple(shape), float("nan"), dtype=dtype, device="cuda")


def with_grads(arguments, positions):
    """Fresh leaves at the differentiable places."""
    return [
        a.detach().clone().requires_grad_() if i in positions else a
        for i, a in enumerate(arguments)
    ]


def on_cpu(arguments, dtype=None):
    """The same arguments on the CPU, floating ones in another dtype."""
    moved = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
    return [
        a.to(dtype) if dtype and isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in moved
    ]


def run(function, arguments, positions, grad):
    """Output and gradients."""
    arguments = with_grads(arguments, positions)
    y = function(*arguments)
    grads = torch.autograd.grad(y, [arguments[i] for i in positions], grad.to(y))
    return [y.detach(), *grads]
