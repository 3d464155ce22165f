"""Target `files`: files of `sk.save` with changed bytes, headers, shapes and lengths."""

import functools
import json
import math
import struct
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

import sparsekern as sk
from sparsekern.storage import HEADER_KEY

from .oracle import EXPECTED
from .spoil import HUGE, INTEGERS, WAYS, spoil_index

_WORDS = ("csr", "nm", "block", "block:4x4", "2:4", "int8", "I32", "F64", "", "../x", "weight", "0")


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        sk.SparseLinear(24, 16, sparsity=0.6),
        sk.SparseLinear(16, 16, pattern="2:4"),
        sk.SparseLinear(16, 12, sparsity=0.5, pattern="block:4x4"),
        nn.Unflatten(1, (3, 2, 2)),
        sk.SparseConv2d(3, 4, 3, padding=1, sparsity=0.5),
        nn.BatchNorm2d(4),
    ).eval()


@functools.cache
def _file(form: int) -> bytes:
    """A sound file: of the layers as they are, or of their int8 weights."""
    model = _model(1)
    if form:
        sk.quantize(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        sk.save(model, path)
        return path.read_bytes()


def _contents(data: bytes) -> tuple[dict, dict]:
    """The tensors of a file, and our header."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][HEADER_KEY])
    return load(data), header


def _places(node, path=()):
    """The paths of all leaves of a header."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from _places(value, (*path, key))
        else:
            yield (*path, key)


def _change_leaf(node, path, rng):
    for key in path[:-1]:
        node = node[key]
    old = node[path[-1]]
    if rng.random() < 0.1:
        del node[path[-1]]
    elif isinstance(old, bool) or old is None:
        node[path[-1]] = rng.choice([True, False, None, 1, "yes"])
    elif isinstance(old, (int, float)):
        steps = [old + 1, old - 1, old * 2, old // 2, *INTEGERS, *HUGE, -0.5, "4", None, [1]]
        node[path[-1]] = rng.choice(steps)
    else:
        node[path[-1]] = rng.choice([*_WORDS, 3, None, old * 100, old[:-1]])


def _change_ours(tensors: dict, header: dict, rng) -> str:
    path = rng.choice(list(_places(header)))
    _change_leaf(header, path, rng)
    return f"header {'/'.join(map(str, path))}"


def _change_tensor(tensors: dict, header: dict, rng) -> str:
    """Another shape, dtype or contents, or a size that no memory has, of an empty tensor."""
    name = rng.choice(list(tensors))
    t, way = tensors[name], rng.choice(["fewer", "more", "dtype", "dimension", "empty", "contents"])
    if way == "contents" and not (t.dtype.is_floating_point or t.dtype == torch.bool):
        tensors[name] = spoil_index(t, rng)
    elif way == "empty":
        sizes = [2 ** rng.randrange(62) for _ in range(t.dim() + rng.randrange(2))]
        sizes[rng.randrange(len(sizes) or 1) : 1] = [0]
        kept = [s if math.prod(filter(None, sizes)) < 2**62 else 1 for s in sizes]
        tensors[name] = t.new_empty([0, *kept[1:]])
    else:
        tensors[name] = WAYS.get(way, WAYS["flat"])(t, rng).contiguous()
    return f"tensor {name} {way}"


def _hollow(tensors: dict, header: dict, rng) -> str:
    """Parts of a weight that agree, of blocks without end that are none."""
    values = [name for name in tensors if name.endswith(".values") and tensors[name].dim() > 1]
    if not values:  # another change took them away
        return "hollow nothing"
    name = rng.choice(values)
    weight = name.removesuffix("values")
    ones = [1] * (tensors[name].dim() - 2)
    tensors[name] = tensors[name].new_empty([0, 2 ** rng.randrange(20, 61), *ones])
    for part in ("block_col", "block_crow", "index", "scales"):
        if weight + part in tensors and rng.random() < 0.9:
            size = 2 if part == "block_crow" else 0
            old = tensors[weight + part]
            tensors[weight + part] = old.new_zeros([size] + [0] * (old.dim() - 1))
    return f"hollow {name}"


def _change_names(tensors: dict, header: dict, rng) -> str:
    """Swap two entries, leave one out, or give one another name."""
    a, b = rng.sample(list(tensors), 2)
    way = rng.randrange(3)
    if way == 0:
        tensors[a], tensors[b] = tensors[b], tensors[a]
    elif way == 1:
        del tensors[a]
    else:
        tensors[f"{a}.{rng.choice(_WORDS)}"] = tensors.pop(b)
    return f"names {a} {b}"


def _spoilt(data: bytes, rng) -> tuple[str, bytes]:
    way = rng.randrange(10)
    if way == 0:
        data = bytearray(data)
        for _ in range(rng.choice([1, 1, 4, 50])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return "bits", bytes(data)
    if way == 1:
        return "length", data[: rng.randrange(len(data))] + bytes(rng.randrange(100))
    tensors, header = _contents(data)
    changes = [_change_ours, _change_ours, _change_tensor, _change_tensor, _change_names]
    changes.append(_hollow)
    labels = [rng.choice(changes)(tensors, header, rng) for _ in range(rng.choice([1, 1, 2, 3]))]
    return ", ".join(labels), save(tensors, {HEADER_KEY: json.dumps(header)})


def _loaded_fault(model, x) -> str:
    """Say why a model that was loaded is no model; empty when it is one."""
    try:
        with torch.no_grad():
            y, dense = model(x), sk.to_dense(model)(x)
    except EXPECTED as error:
        return f"a model that does not run: {str(error)[:200]}"
    same = torch.allclose(y.double(), dense.double(), atol=1e-3, rtol=1e-3, equal_nan=True)
    large = not bool(y.abs().max() < 1e4)  # bits of an exponent: sums then cancel
    return "" if same or large else "a product that is not that of the dense weight"


def run(rng) -> tuple[str, str]:
    """One case: what it was, and its fault, empty when there is none."""
    label, data = _spoilt(_file(rng.randrange(2)), rng)
    model, x = _model(), torch.randn(3, 24)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "spoilt.safetensors")
        path.write_bytes(data)
        try:
            sk.load(model, path)
        except (*EXPECTED, OSError) as error:
            return label, _refusal_fault(model, before, path, error)
        except Exception as error:
            return label, f"a {type(error).__name__}: {str(error)[:200]}"
    return label, _loaded_fault(model, x)


def _refusal_fault(model, before: dict, path: Path, error: Exception) -> str:
    after = model.state_dict()
    if list(after) != list(before) or not all(torch.equal(after[k], before[k]) for k in before):
        return f"a refusal that changed the model: {str(error)[:200]}"
    text = str(error)
    if "llocate" in text:
        return f"memory without a bound: {text[:200]}"
    return "" if "load" in text and str(path) in text else f"no load and path in: {text[:200]}"
