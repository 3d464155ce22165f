"""Sparse weights: what a sparse layer stores and how it multiplies.

A weight is a module with plain dense tensors, no tensor subclass and no sparse-layout tensor, so
that optimizers, deepcopy, pickle, `.to()`, DDP and torch.compile work unaided. `values` is an
ordinary parameter; the indices are buffers.
"""

import torch
from torch import Tensor, nn

from .ops.conv import csr_conv2d
from .ops.csr import csr_linear, csr_plan

INT32_MAX = 2**31 - 1


def _check(condition: bool, wanted: str, got) -> None:
    if not condition:
        raise ValueError(f"CSRWeight: expected {wanted}, got {got}")


def check_csr(values: Tensor, crow: Tensor, col: Tensor, shape) -> None:
    """Raise ValueError unless the parts are a canonical CSR of a weight of `shape`.

    Args:
        values: `(nnz,)`, floating point.
        crow: `(rows + 1,)`, int32, from 0 to nnz, never falling; rows = shape[0].
        col: `(nnz,)`, int32, strictly rising inside each row, in [0, product of shape[1:]).
        shape: Shape of the dense weight, two or four dimensions.
    """
    _check(len(shape) in (2, 4), "a shape of 2 or 4 dimensions", tuple(shape))
    rows, cols = shape[0], torch.Size(shape[1:]).numel()
    _check(max(rows, cols) <= INT32_MAX, "sizes below 2^31", tuple(shape))
    _check(
        values.is_floating_point() and values.dim() == 1,
        "values (nnz,) in floating point",
        f"{values.dtype} of shape {tuple(values.shape)}",
    )
    for name, index in (("crow", crow), ("col", col)):
        _check(
            index.dtype == torch.int32 and index.dim() == 1,
            f"{name} int32 with one dimension",
            f"{index.dtype} of shape {tuple(index.shape)}",
        )
    nnz = values.numel()
    _check(crow.numel() == rows + 1, f"crow of {rows + 1} entries (out + 1)", crow.numel())
    _check(col.numel() == nnz, f"col of {nnz} entries like values", col.numel())
    if values.is_meta:
        return
    first, last = int(crow[0]), int(crow[-1])
    _check(first == 0 and last == nnz, f"crow from 0 to nnz = {nnz}", f"from {first} to {last}")
    falling = int((crow[1:] < crow[:-1]).sum())
    _check(falling == 0, "crow that never falls", f"{falling} falling steps")
    if nnz:
        low, high = int(col.min()), int(col.max())
        _check(low >= 0 and high < cols, f"columns in [0, {cols})", f"[{low}, {high}]")
        same_row = torch.ones(nnz, dtype=torch.bool, device=col.device)
        starts = crow[:-1].long()
        same_row[starts[starts < nnz]] = False
        wrong = int(((col[1:] <= col[:-1]) & same_row[1:]).sum())
        _check(wrong == 0, "columns that rise strictly inside each row", f"{wrong} that do not")


class CSRWeight(nn.Module):
    """The surviving weights of a layer in compressed sparse rows.

    Attributes:
        values: Parameter `(nnz,)`, row by row, columns rising.
        crow: Buffer `(out + 1,)` int32, where each row starts in `values`.
        col: Buffer `(nnz,)` int32, column of each value. A convolution weight
            `(out, in / groups, kh, kw)` counts over its last three dimensions flattened.
        shape: Shape of the dense weight.
        pattern: The pattern the nonzeros follow, as `sparsekern.patterns.parse` takes it.
        groups: Groups of the convolution, 1 for a linear layer.
        plan, plan_t: Schedules of the kernels, derived from the indices, not in the state_dict.
            `plan_t` serves the input gradient and is made by `prepare_training`.
    """

    def __init__(self, values, crow, col, shape, pattern="unstructured", groups=1):
        super().__init__()
        check_csr(values, crow, col, shape)
        self.shape = torch.Size(shape)
        self.pattern = str(pattern)
        self.groups = groups
        self.values = values if isinstance(values, nn.Parameter) else nn.Parameter(values)
        self.register_buffer("crow", crow)
        self.register_buffer("col", col)
        self.register_buffer("plan", crow.new_empty(0), persistent=False)
        self.register_buffer("plan_t", crow.new_empty(0), persistent=False)
        self._make_plans(training=False)

    @classmethod
    def from_parts(cls, values, crow, col, shape, pattern="unstructured", groups=1) -> "CSRWeight":
        """Build from CSR parts; see `check_csr` for what they must be (ValueError otherwise)."""
        return cls(values, crow, col, shape, pattern, groups)

    @classmethod
    def from_dense(cls, weight, mask=None, pattern="unstructured", groups=1) -> "CSRWeight":
        """Keep the weights where `mask` is True; without a mask, those that are not zero.

        Args:
            weight: `(out, in)` or `(out, in / groups, kh, kw)`, floating point.
            mask: Boolean, same shape, True = kept.
            pattern: Name of the pattern, recorded only.
            groups: Groups of the convolution.
        """
        weight = weight.detach()
        _check(weight.dim() in (2, 4), "a weight of 2 or 4 dimensions", tuple(weight.shape))
        _check(weight.is_floating_point(), "a floating point weight", weight.dtype)
        _check(weight.numel() <= INT32_MAX, "fewer than 2^31 weights", weight.numel())
        if weight.is_meta:
            raise ValueError("CSRWeight: expected a weight with data, got one on the meta device")
        flat = weight.reshape(weight.shape[0], weight.shape[1:].numel())
        kept = flat != 0 if mask is None else mask.reshape(flat.shape)
        _check(kept.dtype == torch.bool, "a boolean mask", kept.dtype)
        counts = kept.sum(1)
        crow = torch.zeros(flat.shape[0] + 1, dtype=torch.int32, device=flat.device)
        crow[1:] = counts.cumsum(0)
        col = kept.nonzero()[:, 1].to(torch.int32)
        return cls(flat[kept], crow, col, weight.shape, pattern, groups)

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the values; models that ask `layer.weight.dtype` get what they expect."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self.values.device

    @property
    def taps(self) -> int:
        """Kernel positions of a convolution, 1 for a linear layer."""
        return self.shape[2:].numel()

    @property
    def sparsity(self) -> float:
        """Share of weights that are not stored."""
        total = self.shape.numel()
        return 1 - self.nnz / total if total else 0.0

    def rows(self) -> Tensor:
        """Row of each value, `(nnz,)` int64."""
        index = torch.arange(self.shape[0], device=self.crow.device)
        return torch.repeat_interleave(index, self.crow.diff().long())

    def mask(self) -> Tensor:
        """Boolean mask in the shape of the dense weight, True = stored."""
        flat = torch.zeros(
            self.shape[0], self.shape[1:].numel(), dtype=torch.bool, device=self.col.device
        )
        flat[self.rows(), self.col.long()] = True
        return flat.view(self.shape)

    def to_dense(self) -> Tensor:
        """The dense weight, zeros where nothing is stored; differentiable in `values`."""
        flat = self.values.new_zeros(self.shape[0], self.shape[1:].numel())
        return flat.index_put((self.rows(), self.col.long()), self.values).view(self.shape)

    def prepare_training(self) -> "CSRWeight":
        """Make the schedule of the input gradient once, instead of on every backward."""
        self._make_plans(training=True)
        return self

    def linear(self, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """act(x W^T + b) for x `(..., in)`; bias `(out,)`."""
        return csr_linear(x, *self._parts(bias), activation)

    def conv2d(self, x, bias, stride, padding, dilation, activation: str) -> Tensor:
        """act(conv2d(x, W) + b) for x `(n, in, h, w)`; result contiguous `(n, out, oh, ow)`."""
        geometry = (self.shape[2:], stride, padding, dilation, self.groups)
        return csr_conv2d(x, *self._parts(bias), *geometry, activation)

    def _parts(self, bias):
        # Straight from the dicts: an attribute of a module costs 0.4 us, a small layer 5 us.
        b = self._buffers
        return self._parameters["values"], b["crow"], b["col"], bias, b["plan"], b["plan_t"]

    def extra_repr(self) -> str:
        """Shape, count and pattern."""
        return f"{tuple(self.shape)}, nnz={self.nnz}, sparsity={self.sparsity:.3f}, {self.pattern}"

    def _make_plans(self, training: bool) -> None:
        if self.crow.is_meta:
            return
        cols = self.shape[1:].numel()
        args = (self.crow, self.col, cols, self.groups, self.taps)
        # Only the bfloat16 kernels read pairs of columns.
        pairs = self.dtype == torch.bfloat16 and len(self.shape) == 2
        self.plan = csr_plan(*args, False, pairs)
        if training:
            self.plan_t = csr_plan(*args, True)

    def _apply(self, fn, recurse=True):
        """As every module; a change to or from bfloat16 changes the schedule."""
        before = self.dtype
        super()._apply(fn, recurse)
        if torch.bfloat16 in (before, self.dtype) and before != self.dtype:
            self._make_plans(training=self.plan_t.numel() > 0)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Take over a pattern with another number of nonzeros, after checking every index."""
        parts = [state_dict.get(prefix + name) for name in ("values", "crow", "col")]
        if all(part is not None for part in parts):
            try:
                check_csr(*parts, self.shape)
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.')}: {error}")
                return
            self._resize(parts[0].numel())
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if all(part is not None for part in parts):
            self._make_plans(training=self.plan_t.numel() > 0)

    def _resize(self, nnz: int) -> None:
        if nnz == self.nnz:
            return
        old = self.values
        self.values = nn.Parameter(old.detach().new_zeros(nnz), requires_grad=old.requires_grad)
        self.col = self.col.new_zeros(nnz)
