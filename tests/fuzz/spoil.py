"""Ways to spoil an argument, by its kind."""

import math

import torch

HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1)
INTEGERS = (-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 5, 16, 17, 255, 65536, *HUGE)
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
INDICES = ("crow", "col", "index")


def _sliced(t, rng):
    if not t.dim():
        return t[None]
    axis = rng.randrange(t.dim())
    return t.narrow(axis, 0, rng.randrange(t.shape[axis] + 1))


def _grown(t, rng):
    if not t.dim():
        return t.repeat(3)
    axis = rng.randrange(t.dim())
    return torch.cat([t, t.narrow(axis, 0, min(1, t.shape[axis]))], axis)


def _strided(t, rng):
    return t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t


def _expanded(t, rng):
    """A size of 2^20 to 2^62 without its memory."""
    one = t.flatten()[:1]
    if not one.numel():
        return t.new_zeros(1).expand(2 ** rng.randrange(20, 63))
    shape = list(t.shape) or [1]
    place = rng.randrange(len(shape))
    others = math.prod(shape) // max(1, shape[place])
    shape[place] = 2 ** rng.randrange(20, 63 - others.bit_length())
    return one.reshape([1] * len(shape)).expand(shape)


def _sparse(t, rng):
    layouts = [t.to_sparse] + ([t.to_sparse_csr] if t.dim() == 2 else [])
    return rng.choice(layouts)()


def _quantized(t, rng):
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)


def _conjugate(t, rng):
    """A float tensor whose negative bit is set, or a complex one."""
    return torch.complex(t.float(), t.float()).conj().imag if rng.random() < 0.7 else t.cfloat()


def _nonfinite(t, rng):
    if not t.numel() or not t.is_floating_point():
        return _sliced(t, rng)
    t.view(-1)[rng.randrange(t.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    return t


WAYS = {
    "dtype": lambda t, rng: t.to(rng.choice(DTYPES)),
    "fewer": _sliced,
    "more": _grown,
    "dimension": lambda t, rng: t[None] if rng.random() < 0.5 or t.numel() < 2 else t.select(-1, 0),
    "flat": lambda t, rng: t.reshape(-1),
    "scalar": lambda t, rng: t.new_zeros(()),
    "empty": lambda t, rng: t.new_zeros([0] * rng.randrange(1, 5)),
    "meta": lambda t, rng: t.to("meta"),
    "strided": _strided,
    "turned": lambda t, rng: t.transpose(0, -1) if t.dim() > 1 else t.flip(0),
    "expanded": _expanded,
    "sparse": _sparse,
    "quantized": _quantized,
    "conjugate": _conjugate,
    "nonfinite": _nonfinite,
    "none": lambda t, rng: None,
    "number": lambda t, rng: rng.choice(INTEGERS),
}


def spoil_index(t, rng):
    """An index tensor with other contents: out of range, falling, repeated, or any bits."""
    if not t.numel():
        return _grown(t, rng)
    flat = t.view(-1)
    place, top = rng.randrange(t.numel()), torch.iinfo(t.dtype)
    choices = [top.min, top.max, int(flat[place]) ^ 1 << rng.randrange(top.bits - 1)]
    choices += [int(flat[place - 1]), 0, t.numel(), int(flat.max()) + (t.dtype != torch.uint8)]
    flat[place] = min(max(rng.choice(choices), top.min), top.max)
    return t


def _spoil_integers(value, rng):
    value = list(value)
    way = rng.randrange(4)
    if way == 0:
        return value[:-1]
    if way == 1:
        return [*value, rng.choice(INTEGERS)]
    if way == 2:
        return [rng.choice(INTEGERS)] * len(value)
    value[rng.randrange(len(value))] = rng.choice(INTEGERS)
    return value


def spoil(name: str, value, rng):
    """Another value for an argument; which way is told beside it."""
    if isinstance(value, torch.Tensor):
        if name in INDICES and rng.random() < 0.4:
            return "contents", spoil_index(value, rng)
        way = rng.choice(list(WAYS))
        return way, WAYS[way](value, rng)
    if isinstance(value, (list, tuple)):
        return "integers", _spoil_integers(value, rng)
    if isinstance(value, str):
        return "string", rng.choice(["", "tanh", "RELU", "none ", "relu6", "gelu", "x" * 1000])
    if isinstance(value, bool):
        return "bool", not value
    if isinstance(value, float):
        return "float", rng.choice([float("nan"), float("inf"), 0.0, -1.0, 1e300])
    if value is None:
        return "given", torch.zeros(rng.randrange(5), dtype=rng.choice(DTYPES))
    return "integer", rng.choice(INTEGERS)
