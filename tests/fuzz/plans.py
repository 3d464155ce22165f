"""Target `plans`: layers whose plans or indices are not what they were when the plan was made.

Right is an error, or the product with the weight as it is now: `to_dense` reads no plan.
"""

import copy
import functools

import torch
from torch.nn.functional import linear

import sparsekern as sk

from .oracle import EXPECTED
from .spoil import spoil_index

_PATTERNS = {"unstructured": 0.6, "block:4x4": 0.5, "2:4": None}
_SIZES = ((24, 40), (40, 24), (37, 53), (128, 64))


@functools.cache
def _layer(pattern: str, place: int, seed: int):
    out, features = _SIZES[place]
    features += -features % 4 if pattern == "2:4" else 0
    torch.manual_seed(seed)
    sparsity = _PATTERNS[pattern]
    return sk.SparseLinear(features, out, sparsity=sparsity, pattern=pattern)


def _tensors(layer) -> dict:
    """What a plan is and what it is made of, by name."""
    weight = layer.weight
    names = ("plan", "plan_t", "crow", "col", "block_crow", "block_col", "index")
    found = {name: getattr(weight, name, None) for name in names}
    return {name: t for name, t in found.items() if isinstance(t, torch.Tensor) and t.numel()}


def _flip(t, rng) -> None:
    """Change some bits."""
    words = t.view(-1)
    top = torch.iinfo(t.dtype).bits - 1
    for _ in range(rng.choice([1, 1, 2, 20])):
        words[rng.randrange(words.numel())] ^= 1 << rng.randrange(top)


def _average(t, other) -> None:
    """As `torch.optim.swa_utils.AveragedModel` does with buffers."""
    if other.shape == t.shape:
        t.copy_((t.double() * 0.5 + other.double() * 0.5).to(t.dtype))


def _tamper(layer, rng) -> str:
    tensors = _tensors(layer)
    name = rng.choice(list(tensors))
    t, way = tensors[name], rng.choice(["flip", "random", "contents", "other", "average", "short"])
    pattern, place = rng.choice(list(_PATTERNS)), rng.randrange(len(_SIZES))
    other = _tensors(_layer(pattern, place, rng.randrange(3))).get(name)
    if way in ("other", "average") and other is None:
        way = "flip"
    if way == "flip":
        _flip(t, rng)
    elif way == "random":
        t.copy_(torch.randint(0, torch.iinfo(t.dtype).max, t.shape, dtype=t.dtype))
    elif way == "contents":
        spoil_index(t, rng)
    elif way == "average":
        _average(t, other)
    else:
        layer.weight._buffers[name] = other.clone() if way == "other" else t[:-1].clone()
    return f"{name}:{way}"


def _dense(layer):
    try:
        return layer.to_dense().weight.double()
    except (*EXPECTED, IndexError):
        return None  # the indices are no pattern any more


def run(rng) -> tuple[str, str]:
    """One case: what it was, and its fault, empty when there is none."""
    pattern, place = rng.choice(list(_PATTERNS)), rng.randrange(len(_SIZES))
    layer = copy.deepcopy(_layer(pattern, place, rng.randrange(3)))
    x = torch.randn(rng.choice([1, 2, 5, 33]), layer.in_features, requires_grad=True)
    if rng.random() < 0.5:
        layer(x)  # a plan that has been looked at before it is changed
    label = f"{pattern} {_SIZES[place]} {_tamper(layer, rng)}"
    try:
        with torch.set_grad_enabled(rng.random() < 0.7):
            y = layer(x)
        grad = torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else None
    except EXPECTED as error:
        good = ": expected " in str(error) and ", got " in str(error)
        return label, "" if good else f"a message without its parts: {str(error)[:200]}"
    weight = _dense(layer)
    if weight is None:
        return label, "a product with indices that are no pattern"
    want = linear(x.double(), weight, layer.bias.double())
    if not torch.allclose(y.double(), want, atol=1e-4):
        return label, "another product"
    if grad is not None and not torch.allclose(
        grad.double(), weight.sum(0).expand_as(x), atol=1e-3
    ):
        return label, "another gradient"
    return label, ""
