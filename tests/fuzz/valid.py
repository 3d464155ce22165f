"""Valid calls of every op of the namespace, which are then spoilt.

The ops are those of the registry, so a new op is here by itself: its arguments are filled in by
their names, from a sample of its format. A name that nothing here knows is an error.
"""

import functools

import torch
from samples import SAMPLES

from sparsekern.ops import _library, conv  # noqa: F401  (registers the ops)

OPS = sorted(_library.REFERENCES)
_MOST = 60_000  # numbers in x and values: larger samples only take time


def schema(op: str):
    """The arguments of an op, by the schema."""
    return getattr(torch.ops.sparsekern, op).default._schema.arguments


def _sample_op(op: str) -> str:
    """The op whose samples fit."""
    kind = "conv2d" if "conv2d" in op or op == "batch_norm" or "batch_norm" in op else "linear"
    family = op.split("_")[0]
    return f"{family if family in ('csr', 'block', 'nm') else 'csr'}_{kind}"


@functools.cache
def _named(sample_op: str, place: int, dtype: torch.dtype) -> dict:
    """The arguments of a sample by name, and what the other ops of its format ask for."""
    values = SAMPLES[sample_op][place].build(dtype)
    a = {argument.name: v for argument, v in zip(schema(sample_op), values)}
    x = a["x"]
    result = _library.REFERENCES[sample_op](*values)
    a["grad"] = torch.randn(result.shape, dtype=torch.float64).to(dtype)
    a["residual"] = a.get("residual")
    a["rows"] = result.shape[1 if "conv2d" in sample_op else -1]
    a["groups"] = a.get("groups", 1)
    kernel = a.get("kernel_size", [1, 1])
    a["taps"] = kernel[0] * kernel[1]
    if "conv2d" in sample_op:
        a["channels"], a["height"], a["width"] = x.shape[1:]
    else:
        a["in_features"] = a["channels"] = x.shape[-1]
    a["per_group"] = (x.shape[1] if "conv2d" in sample_op else x.shape[-1]) // a["groups"]
    a["cols"] = a["per_group"] * a["taps"]
    if a["values"].dim() == 3:
        a["block_rows"], a["block_cols"] = a["values"].shape[1:]
    return a


def _special(op: str, a: dict) -> dict:
    """What a name means in an op beside its format's."""
    rows = a["rows"]
    if "_int8" in op:
        a["values"] = torch.randint(-127, 128, a["values"].shape, dtype=torch.int8)
        a["scales"] = torch.rand(rows)
        if op.endswith("dynamic") and a["values"].shape[2] % 4:
            a["values"] = a["values"][:0, :1, :1].expand(0, 1, 4)
            a["crow"] = torch.zeros(rows + 1, dtype=torch.int32)
            a["col"], a["plan"] = a["col"][:0], None
    if op.endswith("_plan"):
        a["channels"] = a["per_group"]
    if op.startswith("nm") and ("ste" in op or "prune" in op):
        m, n = 4, 2
        width = a["in_features"] // m * m
        a["weight"] = torch.randn(rows // m * m, width).to(a["x"].dtype)
        a["x"], a["n"], a["m"] = a["x"][..., :width], n, m
        a["grad"], a["bias"] = a["grad"][..., : rows // m * m], None
        a["transposable"] = False
    if op.startswith("batch_norm"):
        channels = a["x"].shape[1]
        for name in ("weight", "bias", "mean", "var"):
            a[name] = torch.rand(channels).to(a["x"].dtype)
        a["eps"], a["activation"] = 1e-5, "none"
        a["grad"] = torch.randn_like(a["x"])
    return a


def valid(op: str, rng) -> dict:
    """Arguments by name that the op takes; tensors are copies."""
    sample_op = _sample_op(op)
    place = rng.randrange(len(SAMPLES[sample_op]))
    narrow = "_int8" in op or op.startswith("batch_norm")
    kinds = [torch.float32] if narrow else [torch.float32, torch.float64, torch.bfloat16]
    a = dict(_named(sample_op, place, rng.choice(kinds)))
    large = a["x"].numel() + a["values"].numel() > _MOST
    if large or (op.startswith("batch_norm") and a["x"].numel() == 0):
        return valid(op, rng)
    a = _special(op, a)
    missing = [s.name for s in schema(op) if s.name not in a and not s.has_default_value()]
    if missing:
        raise KeyError(f"tests/fuzz/valid.py knows no {', '.join(missing)} for {op}")
    given = {s.name: a.get(s.name, s.default_value) for s in schema(op)}
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
