"""block_linear and its gradients on CUDA: plans, the Triton kernels, and the stated dense path.

The kernels are for float16, bfloat16 and float32 on compute capability 8.0 and later, and for
blocks that fill at least half of a tile of the tensor cores (see `misfit`). Everything else is
computed with the dense weight, put together on the device without waiting for it; the reason is
warned of once.

Plans hold what a kernel would have to look up or sort. `plan` (forward, weight gradient) is
`order | row of each block | first block of each chunk`; `plan_t` (input gradient) is the transposed
index `crow | col | slot | order`. All int32; how long each part is follows from the arguments.
"""

import functools
import warnings

import torch

from . import block
from ._library import activate, check_indices
from .block_tuning import chunk_blocks

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_SIDE = 16  # of a tile of the tensor cores
_IMPL = torch.library.Library("sparsekern", "IMPL", "CUDA")


def make_plan(crow, col, channels: int, block_cols: int, taps: int, transpose: bool):
    """The plan of a pattern; see above. Reads sizes back, so it is made once and not per call."""
    count = crow.diff().long()
    row = torch.repeat_interleave(torch.arange(count.numel(), device=crow.device), count)
    if transpose:
        cols = -(-channels // block_cols) * taps
        return torch.cat(_transposed(row, col.long(), cols)).int()
    chunk = chunk_blocks(block_cols)
    chunks = (count + chunk - 1) // chunk
    owner = torch.repeat_interleave(torch.arange(count.numel(), device=crow.device), chunks)
    before = (chunks.cumsum(0) - chunks)[owner]
    within = torch.arange(owner.numel(), device=crow.device) - before
    first = crow.long()[owner] + within * chunk
    return torch.cat((_longest_first(count), row, first)).int()


def _transposed(row, col, cols: int):
    """The index by columns of blocks: crow, col, slot, order."""
    slot = torch.argsort(col, stable=True)  # rows of blocks rise inside a column
    count = torch.bincount(col, minlength=cols)
    crow = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    return crow, row[slot], slot, _longest_first(count)


def _longest_first(count):
    return torch.argsort(count, descending=True, stable=True)


def _plan(crow, col, rows, channels, block_rows, block_cols, groups=1, taps=1, transpose=False):
    check_indices("block_plan", crow, col, -(-channels // block_cols) * taps)
    return make_plan(crow, col, channels, block_cols, taps, transpose)


def forward_parts(op, plan, crow, col, channels, block_cols, taps=1):
    """Order, row of each block and chunks of a plan; of a plan made now, after a check, if none."""
    if plan is None or plan.numel() == 0:
        check_indices(op, crow, col, -(-channels // block_cols) * taps)
        plan = make_plan(crow, col, channels, block_cols, taps, False)
    rows, blocks = crow.numel() - 1, col.numel()
    chunks = plan.numel() - rows - blocks
    _check_plan(op, "plan made by block_plan for this pattern", plan, crow, chunks >= 0)
    return plan.split((rows, blocks, chunks))


def backward_parts(op, plan, crow, col, channels, block_cols, taps=1):
    """The transposed index of a plan: crow, col, slot, order; see `forward_parts`."""
    cols = -(-channels // block_cols) * taps
    if plan is None or plan.numel() == 0:
        check_indices(op, crow, col, cols)
        plan = make_plan(crow, col, channels, block_cols, taps, True)
    sizes = (cols + 1, col.numel(), col.numel(), cols)
    wanted = "plan_t made by block_plan(transpose=True) for this pattern"
    _check_plan(op, wanted, plan, crow, plan.numel() == sum(sizes))
    return plan.split(sizes)


def _check_plan(op: str, wanted: str, plan, crow, fits: bool) -> None:
    fits = fits and plan.dtype == torch.int32 and plan.device == crow.device
    expect(op, fits, wanted, f"{plan.dtype} of {plan.numel()} entries on {plan.device}")


def misfit(dtype, height: int) -> str:
    """Why the kernels cannot take blocks of `height` outputs; empty when they can.

    `height` is R, or C where the blocks are multiplied transposed. The other side may be anything:
    a step takes several blocks of few inputs.
    """
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {dtype}"
    if 2 * height <= MIN_SIDE:
        return f"blocks of {height} fill no more than half of a tile of {MIN_SIDE}"
    return ""


@functools.cache
def device_misfit(device: torch.device) -> str:
    """Why the kernels cannot run on a device; empty when they can."""
    if torch.version.hip:
        return "ROCm is not supported"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0, this device has {major}.{minor}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return ""


@functools.cache
def say_dense(op: str, reason: str) -> None:
    """Warn, once for each reason, that an op is computed with the dense weight."""
    warnings.warn(f"{op}: computed with the dense weight, {reason}", stacklevel=3)


def takes_kernel(op: str, tensor, height: int) -> bool:
    """Whether the kernels take blocks of `height` outputs; if not, the reason is said once."""
    reason = misfit(tensor.dtype, height) or device_misfit(tensor.device)
    if reason:
        say_dense(op, reason)
    return not reason


def dense_weight(values, row, col, rows, channels, groups=1, taps=1):
    """The dense weight (rows, channels, taps), without reading an index back."""
    height, width = values.shape[1:]
    n_rows, n_cols, per_group = block.block_grid(rows, channels, (height, width), groups)
    grid = values.new_zeros(n_rows, n_cols, taps, height, width)
    col = col.long()
    grid.index_put_((row.long(), col // taps, col % taps), values)
    dense = grid.permute(0, 3, 1, 4, 2).reshape(groups, per_group * height, n_cols * width, taps)
    return dense[:, : rows // groups, :channels].reshape(rows, channels, taps)


def blocks_of(dense, row, col, size, groups=1):
    """The values at the stored blocks of a dense (rows, channels, taps) weight."""
    grid, taps, col = block.split_blocks(dense, size, groups), dense.shape[2], col.long()
    return grid[row.long(), col // taps, col % taps].contiguous()


def expect(op: str, condition, wanted: str, got) -> None:
    """Raise `op: expected <wanted>, got <got>` unless the condition holds."""
    if not condition:
        raise RuntimeError(f"{op}: expected {wanted}, got {got}")


def check_values(op: str, like, values, col) -> None:
    """Check values (n_blocks, R, C) against the activation and the columns."""
    expect(op, values.dtype == like.dtype, f"values of dtype {like.dtype}", values.dtype)
    expect(op, values.dim() == 3, "values with 3 dimensions", f"shape {tuple(values.shape)}")
    blocks = col.numel()
    expect(op, len(values) == blocks, f"values.size(0) = col.size(0) = {blocks}", len(values))


def check_pattern(op: str, like, crow, col, block_rows_in_all: int) -> None:
    """Check the sizes, dtype and device of the index; what it holds is vouched for by the plan."""
    for name, part in (("crow", crow), ("col", col)):
        expect(op, part.dtype == torch.int32, f"{name} of dtype torch.int32", part.dtype)
        expect(op, part.device == like.device, f"{name} on the device of x", part.device)
    want = block_rows_in_all + 1
    expect(op, len(crow) == want, f"crow.size(0) = rows of blocks + 1 = {want}", len(crow))


def check_bias(op: str, x, bias, outputs: int, name: str) -> None:
    """Check a bias that may be None."""
    if bias is not None:
        expect(op, bias.dtype == x.dtype, f"bias of the dtype of x ({x.dtype})", bias.dtype)
        got = tuple(bias.shape)
        expect(op, got == (outputs,), f"bias.size(0) = {name} = {outputs}", got)


def _linear(x, values, crow, col, bias, plan, plan_t, out_features, activation="none"):
    op = block.LINEAR
    expect(op, x.dim() >= 1, "x of shape (..., in_features)", "a scalar")
    check_values(op, x, values, col)
    check_pattern(op, x, crow, col, -(-out_features // values.shape[1]))
    check_bias(op, x, bias, out_features, "out_features")
    activate(x.new_empty(0), activation, op)  # refuses unknown names
    order, row, _ = forward_parts(op, plan, crow, col, x.shape[-1], values.shape[2])
    if not takes_kernel(op, values, values.shape[1]):
        weight = dense_weight(values, row, col, out_features, x.shape[-1]).squeeze(2)
        y = torch.nn.functional.linear(x, weight, bias)
        return activate(y, activation, op).contiguous()
    from .block_triton import Index, spmm

    flat = x.reshape(-1, x.shape[-1])
    index = Index(crow, col, None, order)
    y = spmm(flat, values.contiguous(), index, bias, out_features, activation)
    return y.view(*x.shape[:-1], out_features)


def _grad_input(grad, values, crow, col, plan_t, in_features):
    op = "block_linear_grad_input"
    check_values(op, grad, values, col)
    check_pattern(op, grad, crow, col, -(-grad.shape[-1] // values.shape[1]))
    crow_t, row, slot, order = backward_parts(op, plan_t, crow, col, in_features, values.shape[2])
    if not takes_kernel(op, values, values.shape[2]):
        weight = dense_weight(values, unturned(row, slot), col, grad.shape[-1], in_features)
        return (grad @ weight.squeeze(2)).contiguous()
    from .block_triton import Index, spmm

    flat = grad.reshape(-1, grad.shape[-1])
    index = Index(crow_t, row, slot, order)
    y = spmm(flat, values.contiguous(), index, None, in_features, "none")
    return y.view(*grad.shape[:-1], in_features)


def unturned(row, slot):
    """The row of each block, in the order of the values, from a transposed index."""
    return torch.empty_like(row).index_copy_(0, slot.long(), row)


def _grad_values(grad, x, crow, col, plan, block_rows, block_cols):
    op = "block_linear_grad_values"
    check_pattern(op, x, crow, col, -(-grad.shape[-1] // block_rows))
    flat_grad, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    expect(op, len(flat_grad) == len(flat), f"tokens of grad = {len(flat)}", len(flat_grad))
    _, row, chunks = forward_parts(op, plan, crow, col, x.shape[-1], block_cols)
    if not takes_kernel(op, x, block_rows):
        dense = flat_grad.t() @ flat
        return blocks_of(dense[..., None], row, col, (block_rows, block_cols))
    from .block_triton import sddmm

    return sddmm(flat_grad, flat, (crow, col, row, chunks), (block_rows, block_cols))


_IMPL.impl("block_plan", _plan)
_IMPL.impl("block_linear", _linear)
_IMPL.impl("block_linear_grad_input", _grad_input)
_IMPL.impl("block_linear_grad_values", _grad_values)
