"""What every op file needs: the library to define in, and the fallback to the reference."""

import functools
import re

import torch
from torch.library import Library

from .. import _load as _load  # loads the compiled kernels, which register themselves
from ..onnx_export import no_export
from ._checks import check_arguments
from ._geometry import need
from .cuda_support import state_once
from .uneven import pad_first

LIBRARY = Library("sparsekern", "DEF")
# By the name of the op: what its kernels have to give, with the same checks.
REFERENCES = {}
# Kernels of a device win over this key; it serves every device that has none.
_FALLBACK = Library("sparsekern", "IMPL", "CompositeExplicitAutograd")
_CUDA = Library("sparsekern", "IMPL", "CUDA")
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def without_views(function):
    """An implementation in Python whose result is no view, however it was shaped.

    Autograd refuses to change a view that an op returns: `nn.ReLU(inplace=True)` behind a layer
    would fail.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_VIEWS):
            return function(*args, **kwargs)

    return run


class CUDA:
    """Where implementations for CUDA register."""

    @staticmethod
    def impl(name: str, function) -> None:
        """Register a function for an op, by its name without namespace."""
        _CUDA.impl(name, without_views(pad_first(name, function)))


def define(schema: str, reference, fake):
    """Defines an op with its reference implementation and its fake; returns the op."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.sparsekern, name).default
    stating = _stating(name, _named_errors(name, pad_first(name, reference)))
    REFERENCES[name] = plain = _checked(op, stating)
    _FALLBACK.impl(name, without_views(plain))
    torch.library.register_fake(
        f"sparsekern::{name}", no_export(name, _checked(op, fake)), lib=LIBRARY
    )
    return op


def _named_errors(name: str, reference):
    """A reference whose errors name the op, also those of what it calls."""

    @functools.wraps(reference)
    def run(*args, **kwargs):
        try:
            return reference(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            text = str(error)
            if text.startswith(f"{name}:"):
                raise
            ours = re.match(r"[\w:]+: (expected .+)", text, re.DOTALL)
            words = (
                ours[1] if ours else f"expected arguments that torch can compute with, got {text}"
            )
            raise RuntimeError(f"{name}: {words}") from error

    return run


def _checked(op, function):
    """A reference or a fake that refuses what the kernels refuse.

    The dispatcher takes the fake when any argument is on the meta device, also where the others
    hold numbers.
    """
    name = op._schema.name.removeprefix("sparsekern::")
    arguments = [argument.name for argument in op._schema.arguments]
    tensors = [a.name for a in op._schema.arguments if str(a.type) == "Tensor"]

    @functools.wraps(function)
    def run(*args, **kwargs):
        given = dict(zip(arguments, args)) | kwargs
        for tensor in tensors:
            need(name, given[tensor] is not None, f"{tensor} to be a tensor", None)
        check_activation(name, given.get("activation", "none"))
        check_arguments(name, given)
        return function(*args, **kwargs)

    return run


# Activations whose gradient needs no more than their output.
FROM_OUTPUT = ("relu", "relu6")


def row_of_each(crow: torch.Tensor) -> torch.Tensor:
    """Row of each stored value (or block) of a CSR pattern, `(nnz,)` int64."""
    rows = torch.arange(crow.numel() - 1, device=crow.device)
    return torch.repeat_interleave(rows, crow.diff().long())


def _stating(name: str, reference):
    """The reference, which says once that a device without kernels of ours runs it."""

    @functools.wraps(reference)
    def run(*args, **kwargs):
        kind = args[0].device.type
        if kind not in ("cpu", "cuda"):
            state_once(f"{name} multiplies dense on {kind}, for which there are no kernels")
        return reference(*args, **kwargs)

    return run


ACTIVATIONS = ("none", *FROM_OUTPUT, "gelu", "gelu_tanh")


def check_activation(op: str, activation: str) -> None:
    """Refuse an unknown activation."""
    if activation not in ACTIVATIONS:
        names = "none, relu, relu6, gelu or gelu_tanh"
        raise RuntimeError(f"{op}: expected activation to be {names}, got '{activation}'")


def activate(y: torch.Tensor, activation: str, op: str) -> torch.Tensor:
    """The fused activations by name: none, relu, relu6, gelu (erf), gelu_tanh."""
    check_activation(op, activation)
    if activation == "relu":
        return torch.relu(y)
    if activation == "relu6":
        return torch.nn.functional.relu6(y)
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return torch.nn.functional.gelu(y, approximate=approximate)
    return y


def activation_backward(grad, activation: str, output, pre_activation):
    """Gradient before the activation; `pre_activation` is called only where it is needed."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, output, 0)
    if activation == "relu6":
        return torch.ops.aten.hardtanh_backward(grad, output, 0, 6)
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_backward(grad, pre_activation(), approximate=approximate)
    return grad


def check_indices(op: str, crow: torch.Tensor, col: torch.Tensor, cols: int) -> None:
    """Refuses anything that is no CSR pattern, like the compiled ops do."""
    nnz = col.numel()
    start, end = int(crow[0]), int(crow[-1])
    if start != 0 or end != nnz:
        raise RuntimeError(
            f"{op}: expected crow to start at 0 and end at nnz = {nnz}, "
            f"got start {start}, end {end}"
        )
    if bool((crow[1:] < crow[:-1]).any()):
        raise RuntimeError(f"{op}: expected crow to be non-decreasing, got a falling step")
    row = row_of_each(crow)
    rising = (col[1:] > col[:-1]) | (row[1:] != row[:-1])
    if nnz and (int(col.min()) < 0 or int(col.max()) >= cols or not bool(rising.all())):
        raise RuntimeError(
            f"{op}: expected col to rise strictly inside each row and stay in [0, {cols}), "
            f"got columns in [{int(col.min())}, {int(col.max())}]"
        )


def csr_to_dense(op: str, values, crow, col, cols: int) -> torch.Tensor:
    """The dense (rows, cols) matrix of a CSR pattern."""
    check_indices(op, crow, col, cols)
    dense = values.new_zeros(crow.numel() - 1, cols)
    return dense.index_put((row_of_each(crow), col.long()), values)
