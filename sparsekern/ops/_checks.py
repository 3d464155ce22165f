"""What the fakes and the references of all ops check, so that they refuse what the kernels refuse.

An argument has one meaning in all ops, so it is checked by its name: device, layout, dtype, number
of dimensions, then the sizes that have to agree. A new op whose arguments have these names needs
nothing here. The compiled ops check the same in csrc, where it costs nothing.
"""

import torch
from torch import Tensor

from ._geometry import check_conv, need

FLOATS = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
# Of the activations; the same for all that is multiplied with or added to them.
_LIKE_X = ("x", "grad", "values", "weight", "bias", "residual", "mean", "var")
_INT32 = ("crow", "col", "plan", "plan_t")
_ONE_DIMENSION = (*_INT32, "bias", "scales", "mean", "var")
_LARGEST = 2**31 - 1
_MOST_IN_GROUP = 2**16 - 1  # weights of N:M in a group, at all kernel positions


def check_arguments(op: str, a: dict) -> None:
    """Refuse arguments that no kernel takes.

    Args:
        op: The op, without namespace.
        a: The arguments by the names of the schema; those left out have their defaults.

    Raises:
        RuntimeError: "op: expected <argument> <wanted>, got <have>".
    """
    tensors = {name: t for name, t in a.items() if isinstance(t, Tensor)}
    first = next(iter(tensors))
    for name, t in tensors.items():
        _check_place(op, name, t, first, tensors[first])
        _check_dtype(op, name, t, first, tensors[first])
        _check_dimensions(op, name, t)
    for name in ("groups", "taps", "block_rows", "block_cols"):
        need(op, a.get(name, 1) >= 1, f"{name} >= 1", a.get(name))
    for name in ("in_features", "out_features", "out_channels", "channels", "cols", "rows"):
        size = a.get(name, 0)
        need(op, 0 <= size <= _LARGEST, f"{name} in [0, 2^31)", size)
    if "crow" in a:
        need(op, a["crow"].shape[0] >= 1, "crow of shape (rows + 1,)", tuple(a["crow"].shape))
    if "conv2d" in op:
        check_conv(op, a, _rows(op, a))
    _check_sizes(op, a)


def _same(op: str, what: str, have, want) -> None:
    need(op, have == want, f"{what} = {want}", have)


def _check_place(op: str, name: str, t: Tensor, first: str, like: Tensor) -> None:
    plain = t.layout == torch.strided and not t.is_quantized and not t.is_nested
    kind = "a quantized tensor" if t.is_quantized else f"layout {t.layout}"
    need(op, plain, f"{name} as a plain dense tensor", kind)
    wanted = f"{name} on the device of {first} ({like.device})"
    need(op, t.device == like.device, wanted, t.device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_dtype(op: str, name: str, t: Tensor, first: str, like: Tensor) -> None:
    int8 = "_int8" in op
    if name == "values" and int8:
        allowed = (torch.int8, torch.uint8) if op.startswith("nm") else (torch.int8,)
    elif name in _LIKE_X:
        allowed = FLOATS
    else:
        kinds = {"scales": torch.float32, "index": torch.uint8}
        allowed = (kinds.get(name, torch.int32),)
    wanted = " or ".join(map(_name, allowed))
    need(op, t.dtype in allowed, f"{name} of dtype {wanted}", _name(t.dtype))
    if name in _LIKE_X and not int8:
        same = f"{name} of the dtype of {first} ({_name(like.dtype)})"
        need(op, t.dtype == like.dtype, same, _name(t.dtype))


def _check_dimensions(op: str, name: str, t: Tensor) -> None:
    shape = f"shape {tuple(t.shape)}"
    image = "conv2d" in op or op.startswith("batch_norm")
    if name in ("x", "grad") and not image:
        features = "in_features" if name == "x" else "out_features"
        return need(op, t.dim() >= 1, f"{name} of shape (..., {features})", "a scalar")
    if name in _ONE_DIMENSION:
        count = 1
    elif name == "values":
        count = {"csr": 1, "nm": 2, "block": 3}[op.split("_")[0]]
    elif name == "weight":
        count = 1 if op.startswith("batch_norm") else 2
    else:
        count = 4 if name in ("x", "grad", "residual") else 2
    need(op, t.dim() == count, f"{name} with {count} dimensions", shape)


def _rows(op: str, a: dict):
    """Outputs of the weight."""
    for name in ("out_features", "out_channels", "rows"):
        if name in a:
            return a[name]
    if op.startswith("csr"):
        return a["crow"].shape[0] - 1
    if "index" in a:
        return a["index"].shape[0]
    if op.startswith("batch_norm"):
        return a["x"].shape[1]
    if "weight" in a:
        return a["weight"].shape[0]
    return a["grad"].shape[1 if "conv2d" in op else -1]


def _channels(a: dict):
    """Inputs of the weight, in one group, and kernel positions."""
    if "kernel_size" in a:
        channels = a["x"].shape[1] if "x" in a else a["channels"]
        return channels // a["groups"], a["kernel_size"][0] * a["kernel_size"][1]
    if "channels" in a:
        return a["channels"], a.get("taps", 1)
    return (a["x"].shape[-1] if "x" in a else a["in_features"]), 1


def _tokens(t: Tensor):
    return t.shape[:-1].numel()


def _check_sizes(op: str, a: dict) -> None:
    rows = _rows(op, a)
    for name in ("bias", "scales", *(("weight", "mean", "var") if "batch_norm" in op else ())):
        if a.get(name) is not None:
            _same(op, f"{name}.size(0) = number of outputs", a[name].shape[0], rows)
    if "linear" in op and "grad" in a:
        _same(op, "grad.size(-1) = out_features", a["grad"].shape[-1], rows)
        if "x" in a:
            _same(op, "tokens of grad = tokens of x", _tokens(a["grad"]), _tokens(a["x"]))
    groups = a.get("groups", 1)
    fits = rows % groups == 0 and (groups == 1 or groups <= rows)
    need(op, fits, f"rows divisible by groups = {groups}", rows)
    if op.startswith("batch_norm"):
        _check_norm(op, a)
    elif op.startswith("block"):
        _check_block(op, a, rows, groups)
    elif op.startswith("csr"):
        _check_csr(op, a)
    elif "index" in a:
        _check_nm(op, a, rows)
    else:
        _check_pruned(op, a)


def _check_norm(op: str, a: dict) -> None:
    x = a["x"]
    if "grad" in a:
        same = f"grad of the shape of x, {tuple(x.shape)}"
        need(op, a["grad"].shape == x.shape, same, tuple(a["grad"].shape))
    count = x.shape[0] * x.shape[2] * x.shape[3]
    need(op, count >= 2, "more than one value per channel", f"x of shape {tuple(x.shape)}")


def _check_csr(op: str, a: dict) -> None:
    if "values" in a:
        nnz = a["values"].shape[0]
        _same(op, "col.size(0) = values.size(0)", a["col"].shape[0], nnz)
    if "cols" in a:
        taps = a.get("taps", 1)
        need(op, a["cols"] % taps == 0, f"cols divisible by taps = {taps}", a["cols"])
        besides = a.get("transpose") or a.get("groups", 1) > 1 or taps > 1
        alone = "pairs only for the forward plan of a linear layer"
        need(op, not (a.get("pairs") and besides), alone, "transpose, groups or taps besides")


def _check_pruned(op: str, a: dict) -> None:
    """Of the ops that prune a dense weight as they go."""
    n, m = a["n"], a["m"]
    need(op, 1 <= n < m, "1 <= n < m", f"{n}:{m}")
    if "x" in a:
        _same(op, "x.size(-1) = in_features", a["x"].shape[-1], a["weight"].shape[1])


def _check_block(op: str, a: dict, rows, groups) -> None:
    if "values" in a:
        blocks, height, width = a["values"].shape
        _same(op, "values.size(0) = col.size(0)", blocks, a["col"].shape[0])
        need(op, height >= 1, "blocks of at least 1 x 1", f"{height} x {width}")
        need(op, width >= 1, "blocks of at least 1 x 1", f"{height} x {width}")
    else:
        height, width = a["block_rows"], a["block_cols"]
    need(op, height * width <= _LARGEST, "blocks of fewer than 2^31 weights", f"{height} x {width}")
    if op.endswith("dynamic"):
        need(op, width % 4 == 0, "blocks of a multiple of 4 columns", width)
    want = groups * -(-(rows // groups) // height) + 1
    _same(op, "crow.size(0) = rows of blocks + 1", a["crow"].shape[0], want)


def _check_nm(op: str, a: dict, rows) -> None:
    index, n, m = a["index"], a["n"], a["m"]
    need(op, 1 <= n < m <= 16, "1 <= n < m <= 16", f"{n}:{m}")
    channels, taps = _channels(a)
    fits = channels >= 1 and (channels % m == 0 or channels % m >= n)
    need(op, fits, f"groups of {m} that hold {n} each", f"{channels} columns")
    many = "at most 65535 weights in a group with its kernel positions"
    need(op, m * taps <= _MOST_IN_GROUP, many, f"{m} at {taps} positions")
    slots = -(-channels // m) * taps * n
    _same(op, "index.size(0) = rows", index.shape[0], rows)
    _same(
        op, "index.size(1) = bytes of a row", index.shape[1], -(-slots * (2 if m <= 4 else 4) // 8)
    )
    if "values" in a:
        _same(op, "values.size(0) = rows", a["values"].shape[0], rows)
        _same(op, "values.size(1) = values of a row", a["values"].shape[1], slots)
