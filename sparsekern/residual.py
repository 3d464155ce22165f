"""Sums of residual blocks, added by the sparse convolution that computes one of their terms.

`act(conv(x) + shortcut)` costs two more passes over the result when it is written as a sum and a
module: the convolution takes the other term along (`SparseConv2d.forward(x, residual,
activation)`).
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from .fuse import FUSABLE, kind_of_activation
from .nn import SparseConv2d

_ADD = {operator.add, torch.add, "add"}
_RELU = {F.relu, torch.relu, "relu"}
# What may lie between a convolution and its sum: the convolution moves behind it.
_MOVABLE = (SparseConv2d, nn.Conv2d, nn.BatchNorm2d, nn.Identity)


def fuse_sums(graph: fx.Graph, modules: dict[str, nn.Module]) -> int:
    """Let convolutions add what is added to them; returns how many sums are gone."""
    return sum(_fuse_sum(graph, modules, node) for node in list(graph.nodes))


def _fuse_sum(graph: fx.Graph, modules: dict, node: fx.Node) -> bool:
    """Rewrite one sum, if a convolution that nothing else reads gives one of its terms."""
    in_place = node.target == "add_"  # `+=` is traced as a sum of its own, see _compare
    if not (in_place or node.target in _ADD) or len(node.args) != 2 or node.kwargs:
        return False
    for conv, residual in (node.args, node.args[::-1]):
        if _gives(modules, conv, node) and isinstance(residual, fx.Node):
            break
        if in_place:  # the other term would be changed
            return False
    else:
        return False
    kind, last = _activation_after(modules, node, modules[conv.target])
    with graph.inserting_before(node):
        arguments = (*conv.args, residual, kind)
        fused = graph.call_module(conv.target, arguments, dict(conv.kwargs))
    last.replace_all_uses_with(fused)
    for old in dict.fromkeys((last, node, conv)):
        graph.erase_node(old)
    return True


def _gives(modules: dict, conv, node: fx.Node) -> bool:
    """Whether `conv` is a call of a sparse convolution that can move to where `node` is."""
    if not isinstance(conv, fx.Node) or conv.op != "call_module" or set(conv.kwargs) - {"pads"}:
        return False
    layer = modules[conv.target]
    if not isinstance(layer, SparseConv2d) or layer.activation != "none":
        return False
    if set(conv.users) != {node} or len(conv.args) != 1:
        return False
    between = conv.next
    while between is not node:
        movable = between.op == "call_module" and isinstance(modules[between.target], _MOVABLE)
        if not movable:
            return False
        between = between.next
    return True


def _activation_after(modules: dict, node: fx.Node, layer: SparseConv2d) -> tuple[str, fx.Node]:
    """Which activation alone reads the sum, and the node that ends with it."""
    reader = next(iter(node.users), None)
    if len(node.users) != 1 or reader.args != (node,):
        return "none", node
    if reader.target in _RELU and not set(reader.kwargs) - {"inplace"}:
        return "relu", reader
    if reader.op == "call_module":
        module = modules[reader.target]
        stateless = not (module._parameters or module._buffers or module._modules)
        kind = kind_of_activation(module, layer.weight.dtype) if stateless else None
        if kind in FUSABLE:
            return kind, reader
    return "none", node
