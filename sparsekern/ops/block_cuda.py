"""block_linear and its gradients on CUDA: plans, and the fastest of our Triton kernels and dense.

The kernels are for float16, bfloat16 and float32 on compute capability 8.0 and later, and for
blocks that fill more than half of the smallest tile of the tensor cores (see `misfit`). At the
first call of a shape the candidates of `block_tuning` and the product with the dense weight, put
together on the device without a wait, are timed (see `cuda_choice`). Where no kernel fits, the
dense weight is what is left, and the reason is said once.

Plans hold what a kernel would have to look up or sort. `plan` (forward, weight gradient) is
`order | row of each block | first block of each chunk`; `plan_t` (input gradient) is the transposed
index `crow | col | slot | order`. All int32; how long each part is follows from the arguments. In a
convolution the rows of the transposed index are blocks of input channels, its columns count (row of
blocks of the group, kernel position from the last to the first).
"""

from functools import partial

import torch

from . import block
from ._library import CUDA, check_activation, check_indices
from .block_tuning import candidates, chunk_blocks, precision, worth_timing
from .cuda_choice import run_fastest, shape_key, token_bucket
from .cuda_quick import call_key, keep_call, quick_call
from .cuda_support import (
    aligned,
    check,
    check_bias,
    check_operand,
    device_facts,
    device_fault,
    finish,
    refuse,
    state_once,
    triton_fault,
)

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_SIDE = 16  # of a tile of the tensor cores


def make_plan(crow, col, channels: int, block_cols: int, taps: int, transpose: bool, groups=1):
    """The plan of a pattern; see above. Reads sizes back, so it is made once and not per call."""
    count = crow.diff().long()
    row = torch.repeat_interleave(torch.arange(count.numel(), device=crow.device), count)
    if transpose:
        cols, per_group, col = -(-channels // block_cols), count.numel() // groups, col.long()
        turned = (row % per_group) * taps + taps - 1 - col % taps
        channel = (row // per_group) * cols + col // taps
        return torch.cat(_transposed(turned, channel, groups * cols)).int()
    chunk = chunk_blocks(block_cols)
    chunks = (count + chunk - 1) // chunk
    owner = torch.repeat_interleave(torch.arange(count.numel(), device=crow.device), chunks)
    before = (chunks.cumsum(0) - chunks)[owner]
    within = torch.arange(owner.numel(), device=crow.device) - before
    first = crow.long()[owner] + within * chunk
    return torch.cat((_longest_first(count), row, first)).int()


def _transposed(row, col, cols: int):
    """The index by columns of blocks: crow, col, slot, order."""
    slot = torch.argsort(col, stable=True)
    count = torch.bincount(col, minlength=cols)
    crow = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    return crow, row[slot], slot, _longest_first(count)


def _longest_first(count):
    return torch.argsort(count, descending=True, stable=True)


def _plan(crow, col, rows, channels, block_rows, block_cols, groups=1, taps=1, transpose=False):
    check_indices("block_plan", crow, col, -(-channels // block_cols) * taps)
    return make_plan(crow, col, channels, block_cols, taps, transpose, groups)


def forward_parts(op, plan, crow, col, channels, block_cols, taps=1):
    """Order, row of each block and chunks of a plan; of a plan made now, after a check, if none."""
    if plan is None or plan.numel() == 0:
        check_indices(op, crow, col, -(-channels // block_cols) * taps)
        plan = make_plan(crow, col, channels, block_cols, taps, False)
    rows, blocks = crow.numel() - 1, col.numel()
    chunks = plan.numel() - rows - blocks
    _check_plan(op, "plan made by block_plan for this pattern", plan, crow, chunks >= 0)
    return plan.split((rows, blocks, chunks))


def backward_parts(op, plan, crow, col, channels, block_cols, taps=1, groups=1):
    """The transposed index of a plan: crow, col, slot, order; see `forward_parts`."""
    cols = -(-channels // block_cols)
    if plan is None or plan.numel() == 0:
        check_indices(op, crow, col, cols * taps)
        plan = make_plan(crow, col, channels, block_cols, taps, True, groups)
    rows = groups * cols
    sizes = (rows + 1, col.numel(), col.numel(), rows)
    wanted = "plan_t made by block_plan(transpose=True) for this pattern"
    _check_plan(op, wanted, plan, crow, plan.numel() == sum(sizes))
    return plan.split(sizes)


def _check_plan(op: str, wanted: str, plan, crow, fits: bool) -> None:
    if not (fits and plan.dtype == torch.int32 and plan.device == crow.device):
        refuse(op, wanted, f"{plan.dtype} of {plan.numel()} entries on {plan.device}")


def misfit(dtype, height: int) -> str:
    """Why the kernels cannot take blocks of `height` outputs; empty when they can.

    `height` is R, or C where the blocks are multiplied transposed. The other side may be anything:
    a step takes several blocks of few inputs.
    """
    if dtype not in KERNEL_DTYPES:
        return f"expected float16, bfloat16 or float32, got {dtype}"
    if 2 * height <= MIN_SIDE:
        return f"blocks of {height} fill no more than half of a tile of {MIN_SIDE}"
    return ""


def kernel_fault(device: torch.device) -> str:
    """Why no kernel runs on a device; empty when they do."""
    return device_fault(device_facts(device.index), (8, 0)) or triton_fault("block_triton")


def takes_kernel(op: str, tensor, height: int) -> bool:
    """Whether the kernels take blocks of `height` outputs; if not, the reason is said once."""
    reason = misfit(tensor.dtype, height) or kernel_fault(tensor.device)
    if reason:
        state_once(f"{op} is computed with the dense weight: {reason}")
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


def check_values(op: str, like, values, col) -> None:
    """Check values (n_blocks, R, C) against the activation and the columns."""
    check_operand(op, "values", values, like, like.dtype)
    check(values.dim() == 3, op, "values with 3 dimensions", values.shape)
    if len(values) != len(col):
        refuse(op, f"values.size(0) = col.size(0) = {len(col)}", len(values))


def check_pattern(op: str, like, crow, col, rows: int) -> None:
    """Check sizes, dtype and device of the index; a plan vouches for what it holds."""
    check_operand(op, "crow", crow, like, torch.int32)
    check_operand(op, "col", col, like, torch.int32)
    if len(crow) != rows + 1:
        refuse(op, f"crow.size(0) = rows of blocks + 1 = {rows + 1}", len(crow))


def product_ways(op, x, values, index, bias, outer, activation) -> dict:
    """The configs worth timing, by name, as calls of the kernel; none where it does not fit."""
    crow, col, slot, order = index
    block_size = tuple(values.shape[1:]) if slot is None else tuple(values.shape[:0:-1])
    if not takes_kernel(op, values, block_size[0]) or 0 in (x.numel(), outer):
        return {}
    from .block_triton import Index, spmm

    rows = order.numel()
    bucket = token_bucket(x.shape[0])
    configs = candidates(x.device, x.element_size(), bucket, block_size, x.shape[1])

    def way(config):
        def run(x, values, bias, plan):
            index = Index(crow, col, slot, plan.narrow(0, 0, rows))
            return spmm(x, values.contiguous(), index, bias, outer, activation, config)

        return partial(run, x, values, bias, order)

    configs = worth_timing(configs, len(x), values.numel())
    return {name: way(config) for name, config in configs.items()}


def choice_key(op: str, x, values, rows: int, cols: int, tokens: int) -> tuple:
    """What the choice of a way depends on."""
    key = shape_key(op, x, rows, cols, values.numel(), tokens)
    return (*key, tuple(values.shape[1:]), precision(x.dtype))


def _linear(x, values, crow, col, bias, plan, plan_t, out_features, activation="none"):
    call = call_key(x, values, bias, crow, col, out_features, activation)
    anew = partial(_timed_linear, call, x, values, crow, col, bias, plan, out_features, activation)
    return quick_call(block.LINEAR, plan, call, (x, values, bias), anew)


def _timed_linear(call, x, values, crow, col, bias, plan, out_features, activation):
    """The product by the fastest way, which is remembered for the next such call."""
    op, rows = block.LINEAR, out_features
    check(x.dim() >= 1, op, "x of shape (..., in_features)", "a scalar")
    cols = x.shape[-1]
    check_values(op, x, values, col)
    check_pattern(op, x, crow, col, -(-rows // values.shape[1]))
    check_bias(op, bias, x, rows)
    check_activation(op, activation)
    order, row, _ = forward_parts(op, plan, crow, col, cols, values.shape[2])
    flat = aligned(x.reshape(-1, cols))

    def dense(x, values, bias, plan):
        row = plan.narrow(0, crow.numel() - 1, col.numel())
        weight = dense_weight(values, row, col, rows, cols).squeeze(2)
        return finish(torch.nn.functional.linear(x, weight, bias), None, activation, op)

    with torch.cuda.device_of(x):
        ways = product_ways(op, flat, values, (crow, col, None, order), bias, rows, activation)
        whole = plan if plan is not None and plan.numel() else torch.cat((order, row))
        ways["dense"] = partial(dense, flat, values, bias, whole)
        key = choice_key(op, x, values, rows, cols, len(flat))
        y = run_fastest(key, ways, x)
        keep_call(plan, call, key, ways)
    return y.view(*x.shape[:-1], rows)


def _grad_input(grad, values, crow, col, plan_t, in_features):
    op, rows, cols = "block_linear_grad_input", grad.shape[-1], in_features
    check_values(op, grad, values, col)
    check_pattern(op, grad, crow, col, -(-rows // values.shape[1]))
    crow_t, row, slot, order = backward_parts(op, plan_t, crow, col, cols, values.shape[2])
    flat = aligned(grad.reshape(-1, rows))

    def dense():
        return flat @ dense_weight(values, unturned(row, slot), col, rows, cols).squeeze(2)

    with torch.cuda.device_of(grad):
        ways = product_ways(op, flat, values, (crow_t, row, slot, order), None, cols, "none")
        key = choice_key(op, grad, values, rows, cols, len(flat))
        y = run_fastest(key, {**ways, "dense": dense}, grad)
    return y.view(*grad.shape[:-1], cols)


def unturned(row, slot):
    """The row of each block, in the order of the values, from a transposed index."""
    return torch.empty_like(row).index_copy_(0, slot.long(), row)


def _grad_values(grad, x, crow, col, plan, block_rows, block_cols):
    op, size = "block_linear_grad_values", (block_rows, block_cols)
    check_operand(op, "grad", grad, x, x.dtype)
    check_pattern(op, x, crow, col, -(-grad.shape[-1] // block_rows))
    grad, flat = aligned(grad.reshape(-1, grad.shape[-1])), aligned(x.reshape(-1, x.shape[-1]))
    if len(grad) != len(flat):
        refuse(op, f"tokens of grad = {len(flat)}", len(grad))
    _, row, chunks = forward_parts(op, plan, crow, col, x.shape[-1], block_cols)

    def dense():
        return blocks_of((grad.t() @ flat)[..., None], row, col, size)

    def kernel():
        from .block_triton import sddmm

        return sddmm(grad, flat, (crow, col, row, chunks), size)

    ways = {"kernel": kernel} if takes_kernel(op, x, block_rows) else {}
    with torch.cuda.device_of(x):
        key = shape_key(op, x, grad.shape[1], flat.shape[1], col.numel(), len(flat))
        return run_fastest((*key, size, precision(x.dtype)), {**ways, "dense": dense}, x)


CUDA.impl("block_plan", _plan)
CUDA.impl("block_linear", _linear)
CUDA.impl("block_linear_grad_input", _grad_input)
CUDA.impl("block_linear_grad_values", _grad_values)
