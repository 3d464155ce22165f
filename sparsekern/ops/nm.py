"""nm_linear: y = act(x W^T + b) where W keeps n of every m columns, and its two gradients.

Shapes: x (..., in), values (out, slots) with slots = groups of columns * n, index (out, bytes)
uint8, bias (out,). The index holds, slot by slot, where in its group a value lies: 2 bits each if
m <= 4, else 4 bits, lowest bits first, each row from a byte of its own. Positions rise inside a
group. The last group may be shorter, but not shorter than n. 1 <= n < m <= 16.

`plan` (vouches for the index) and `plan_t` (the same weight as CSR with its schedules, which the
gradients run on) are made by nm_plan; without them the ops make their own on each call.
"""

import torch

from ._library import activate, define
from .gradients import Format, register_format

LINEAR = "nm_linear"


def slot_bits(m: int) -> int:
    """Bits of the index per slot."""
    return 2 if m <= 4 else 4


def slot_count(channels: int, n: int, m: int, taps: int = 1) -> int:
    """Values in a row."""
    return -(-channels // m) * taps * n


def pack_index(positions: torch.Tensor, m: int) -> torch.Tensor:
    """Positions (rows, slots) in [0, m) as the index (rows, bytes)."""
    bits = slot_bits(m)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(positions.long(), (0, -positions.shape[1] % per_byte))
    shifts = torch.arange(0, 8, bits, device=positions.device)
    return (padded.unflatten(1, (-1, per_byte)) << shifts).sum(2).to(torch.uint8)


def unpack_index(index: torch.Tensor, slots: int, m: int) -> torch.Tensor:
    """The positions (rows, slots) of an index, int64."""
    bits = slot_bits(m)
    shifts = torch.arange(0, 8, bits, device=index.device)
    codes = index.long()[:, :, None] >> shifts & (1 << bits) - 1
    return codes.flatten(1)[:, :slots]


def slot_channels(index, channels: int, n: int, m: int, taps: int = 1) -> torch.Tensor:
    """The channel of each slot, (rows, groups of channels, taps, n) int64."""
    slots = slot_count(channels, n, m, taps)
    positions = unpack_index(index, slots, m).unflatten(1, (-1, taps, n))
    first = torch.arange(0, channels, m, device=index.device)
    return positions + first[:, None, None]


def index_fault(index, channels: int, n: int, m: int, taps: int = 1) -> str:
    """Say what is wrong with the positions of an index; empty when nothing is."""
    channel = slot_channels(index, channels, n, m, taps)
    first = torch.arange(0, channels, m, device=index.device)
    end = (first + m).clamp(max=channels)[:, None, None]
    if not bool((channel < end).all()):
        return "a position past the end of its group"
    if not bool((channel[..., 1:] > channel[..., :-1]).all()):
        return "positions that do not rise inside a group"
    return ""


def slot_columns(op, index, channels: int, n: int, m: int, taps: int = 1) -> torch.Tensor:
    """The column of each slot in the flattened (rows, channels * taps) weight, after a check."""
    fault = index_fault(index, channels, n, m, taps)
    if fault:
        raise RuntimeError(
            f"{op}: expected index with positions that rise strictly inside each group and stay "
            f"in [0, {m}), got {fault}"
        )
    channel = slot_channels(index, channels, n, m, taps)
    return (channel * taps + torch.arange(taps, device=index.device)[:, None]).flatten(1)


def nm_to_dense(op, values, index, channels: int, n: int, m: int, taps: int = 1):
    """The dense (rows, channels * taps) weight; differentiable in values."""
    columns = slot_columns(op, index, channels, n, m, taps)
    return values.new_zeros(values.shape[0], channels * taps).scatter(1, columns, values)


def _linear_reference(x, values, index, bias, plan, plan_t, n, m, activation="none"):
    weight = nm_to_dense(LINEAR, values, index, x.shape[-1], n, m)
    return activate(torch.nn.functional.linear(x, weight, bias), activation, LINEAR).contiguous()


def _linear_fake(x, values, index, bias, plan, plan_t, n, m, activation="none"):
    return x.new_empty((*x.shape[:-1], index.shape[0]))


nm_linear = define(
    "nm_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? plan, Tensor? plan_t, "
    'int n, int m, str activation="none") -> Tensor',
    _linear_reference,
    _linear_fake,
)


def _grad_input_reference(grad, values, index, plan_t, in_features, n, m):
    weight = nm_to_dense("nm_linear_grad_input", values, index, in_features, n, m)
    return (grad @ weight).contiguous()


nm_linear_grad_input = define(
    "nm_linear_grad_input(Tensor grad, Tensor values, Tensor index, Tensor? plan_t, "
    "SymInt in_features, int n, int m) -> Tensor",
    _grad_input_reference,
    lambda grad, values, index, plan_t, in_features, n, m: grad.new_empty(
        (*grad.shape[:-1], in_features)
    ),
)


def _grad_values_reference(grad, x, index, plan_t, n, m):
    columns = slot_columns("nm_linear_grad_values", index, x.shape[-1], n, m)
    dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return dense.gather(1, columns)


nm_linear_grad_values = define(
    "nm_linear_grad_values(Tensor grad, Tensor x, Tensor index, Tensor? plan_t, int n, int m) "
    "-> Tensor",
    _grad_values_reference,
    lambda grad, x, index, plan_t, n, m: x.new_empty(
        (index.shape[0], slot_count(x.shape[-1], n, m))
    ),
)


call_nm_linear = register_format(
    Format(nm_linear, nm_linear_grad_input, nm_linear_grad_values, indices=1)
)


def _plan_reference(index, rows, channels, n, m, groups=1, taps=1, transpose=False):
    slot_columns("nm_plan", index, channels, n, m, taps)
    return index.new_empty((0,), dtype=torch.int32)  # the references need no schedule


def _plan_fake(index, rows, channels, n, m, groups=1, taps=1, transpose=False):
    return index.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int32)


nm_plan = define(
    "nm_plan(Tensor index, int rows, int channels, int n, int m, int groups=1, int taps=1, "
    "bool transpose=False) -> Tensor",
    _plan_reference,
    _plan_fake,
)
