"""block_linear: y = act(x W^T + b) with W in dense blocks, and its two gradients.

Shapes: x (..., in), values (n_blocks, R, C), crow (rows of blocks + 1,) int32, col (n_blocks,)
int32 rising inside each row of blocks, bias (out,). out and in need not be multiples of R and C:
what a block has beyond them is never read, and its gradient is 0. `plan` and `plan_t` are made by
block_plan and vouch for the indices; without them the ops check every index on each call.
"""

import torch

from ._library import (
    activate,
    check_indices,
    define,
    row_of_each,
)
from .gradients import Format, register_format

LINEAR = "block_linear"


def block_grid(rows: int, channels: int, block, groups: int = 1) -> tuple[int, int, int]:
    """Rows of blocks in all groups, blocks along the channels, rows of blocks of one group."""
    per_group = -(-(rows // groups) // block[0])
    return groups * per_group, -(-channels // block[1]), per_group


def blocks_to_dense(op, values, crow, col, rows, channels, groups=1, taps=1):
    """The dense weight (rows, channels, taps) of a block pattern; differentiable in values."""
    height, width = values.shape[1:]
    n_rows, n_cols, per_group = block_grid(rows, channels, (height, width), groups)
    check_indices(op, crow, col, n_cols * taps)
    col = col.long()
    grid = values.new_zeros(n_rows, n_cols, taps, height, width)
    grid = grid.index_put((row_of_each(crow), col // taps, col % taps), values)
    dense = grid.permute(0, 3, 1, 4, 2).reshape(groups, per_group * height, n_cols * width, taps)
    return dense[:, : rows // groups, :channels].reshape(rows, channels, taps)


def dense_to_blocks(dense, crow, col, block, groups=1):
    """The values (n_blocks, R, C) of a pattern from a dense (rows, channels, taps) weight."""
    grid = split_blocks(dense, block, groups)
    taps, col = dense.shape[2], col.long()
    return grid[row_of_each(crow), col // taps, col % taps].contiguous()


def split_blocks(dense, block, groups=1):
    """A dense (rows, channels, taps) weight as (rows of blocks, blocks, taps, R, C), 0-padded."""
    (rows, channels, taps), (height, width) = dense.shape, block
    n_rows, n_cols, per_group = block_grid(rows, channels, block, groups)
    pad = (0, 0, 0, n_cols * width - channels, 0, per_group * height - rows // groups)
    padded = torch.nn.functional.pad(dense.reshape(groups, rows // groups, channels, taps), pad)
    return padded.reshape(n_rows, height, n_cols, width, taps).permute(0, 2, 4, 1, 3)


def _linear_reference(x, values, crow, col, bias, plan, plan_t, out_features, activation="none"):
    weight = blocks_to_dense(LINEAR, values, crow, col, out_features, x.shape[-1]).squeeze(2)
    return activate(torch.nn.functional.linear(x, weight, bias), activation, LINEAR).contiguous()


def _linear_fake(x, values, crow, col, bias, plan, plan_t, out_features, activation="none"):
    return x.new_empty((*x.shape[:-1], out_features))


block_linear = define(
    "block_linear(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias, Tensor? plan, "
    'Tensor? plan_t, SymInt out_features, str activation="none") -> Tensor',
    _linear_reference,
    _linear_fake,
)


def _grad_input_reference(grad, values, crow, col, plan_t, in_features):
    op = "block_linear_grad_input"
    weight = blocks_to_dense(op, values, crow, col, grad.shape[-1], in_features).squeeze(2)
    return (grad @ weight).contiguous()


block_linear_grad_input = define(
    "block_linear_grad_input(Tensor grad, Tensor values, Tensor crow, Tensor col, Tensor? plan_t, "
    "SymInt in_features) -> Tensor",
    _grad_input_reference,
    lambda grad, values, crow, col, plan_t, in_features: grad.new_empty(
        (*grad.shape[:-1], in_features)
    ),
)


def _grad_values_reference(grad, x, crow, col, plan, block_rows, block_cols):
    check_indices("block_linear_grad_values", crow, col, -(-x.shape[-1] // block_cols))
    dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return dense_to_blocks(dense[..., None], crow, col, (block_rows, block_cols))


block_linear_grad_values = define(
    "block_linear_grad_values(Tensor grad, Tensor x, Tensor crow, Tensor col, Tensor? plan, "
    "SymInt block_rows, SymInt block_cols) -> Tensor",
    _grad_values_reference,
    lambda grad, x, crow, col, plan, block_rows, block_cols: x.new_empty(
        (col.shape[0], block_rows, block_cols)
    ),
)


call_block_linear = register_format(
    Format(
        block_linear, block_linear_grad_input, block_linear_grad_values,
        blocks=True, values_plan="plan",
    )
)  # fmt: skip


def _plan_reference(
    crow, col, rows, channels, block_rows, block_cols, groups=1, taps=1, transpose=False
):
    check_indices("block_plan", crow, col, -(-channels // block_cols) * taps)
    return crow.new_empty((0,))  # the reference implementations need no schedule


def _plan_fake(
    crow, col, rows, channels, block_rows, block_cols, groups=1, taps=1, transpose=False
):
    return crow.new_empty((torch.library.get_ctx().new_dynamic_size(),))


block_plan = define(
    "block_plan(Tensor crow, Tensor col, int rows, int channels, int block_rows, int block_cols, "
    "int groups=1, int taps=1, bool transpose=False) -> Tensor",
    _plan_reference,
    _plan_fake,
)
