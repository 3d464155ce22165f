"""Zeros that a model puts around an image, left to the sparse convolution that reads it.

`conv(F.pad(x, ...))` writes the image twice more, once to fill it with zeros; where a padding is of
no size, as models ported from TensorFlow have it, F.pad still makes a copy. Our kernels take zeros
that differ from side to side (`SparseConv2d.forward(x, pads=...)`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx, nn

from .nn import SparseConv2d

_Pads = tuple[int, int, int, int]


def fuse_pads(graph: fx.Graph, modules: dict[str, nn.Module]) -> int:
    """Let convolutions pad what they alone read; returns how many paddings are gone."""
    return sum(_fuse_pad(graph, modules, node) for node in list(graph.nodes))


def _fuse_pad(graph: fx.Graph, modules: dict[str, nn.Module], node: fx.Node) -> bool:
    found = _zeros_around(modules, node)
    conv = node.next
    if found is None or set(node.users) != {conv} or conv.op != "call_module":
        return False
    image, pads = found
    layer = modules[conv.target]
    sparse = isinstance(layer, SparseConv2d) and layer.padding_mode == "zeros"
    if conv.args != (node,) or conv.kwargs or not (sparse or type(layer) is nn.Conv2d):
        return False
    if any(pads):
        if not sparse:
            return False
        conv.kwargs = {"pads": pads}
    conv.args = (image,)
    graph.erase_node(node)
    return True


def _zeros_around(modules: dict[str, nn.Module], node: fx.Node) -> tuple[fx.Node, _Pads] | None:
    """The image and `(left, right, top, bottom)` of a node that puts zeros around it."""
    if node.op == "call_module" and isinstance(modules[node.target], nn.ConstantPad2d):
        module = modules[node.target]
        image, pads, mode, value = node.args[0], module.padding, "constant", module.value
    elif node.op == "call_function" and node.target is F.pad:
        image, pads, mode, value = _arguments(*node.args, **node.kwargs)
    else:
        return None
    pads = tuple(pads) if isinstance(pads, (tuple, list)) else ()
    whole = len(pads) in (2, 4) and all(type(p) is int and p >= 0 for p in pads)
    if mode != "constant" or value not in (None, 0) or not whole:
        return None
    return image, (*pads, 0, 0)[:4]


def _arguments(input, pad, mode="constant", value=None):
    """Those of F.pad, however they were given."""
    return input, pad, mode, value
