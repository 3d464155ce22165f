"""Sums of residual blocks, added by the sparse convolution that computes one of their terms.

`act(conv(x) + shortcut)` costs two more passes over the result when it is written as a sum and a
module. A block whose forward can be traced gets a forward in which the convolution takes the other
term along (`SparseConv2d.forward(x, residual, activation)`). The block itself, its children and its
parameters stay where they are.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from importlib import import_module
from inspect import ismodule

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .chain import is_hooked
from .fuse import FUSABLE, kind_of_activation
from .measure.structure import forward_call
from .nn import SparseConv2d

_ADD = {operator.add, torch.add, "add"}
_RELU = {F.relu, torch.relu, "relu"}
# What may lie between a convolution and its sum: the convolution moves behind it.
_MOVABLE = (SparseConv2d, nn.Conv2d, nn.BatchNorm2d, nn.Identity)


class FusedBlock:
    """The forward of a block in which convolutions add the residuals.

    In training mode the block runs as it was written.

    Attributes:
        block: The module whose forward this is.
        source: Python source of the forward, with `self` for the block.
        names: What the source refers to, modules by their names.
    """

    def __init__(self, block: nn.Module, source: str, names: dict):
        self.block, self.source = block, source
        self.names = {k: _Import(v.__name__) if ismodule(v) else v for k, v in names.items()}
        self._forward = None

    def __call__(self, x: Tensor) -> Tensor:
        """The output of the block."""
        if self.block.training:
            return type(self.block).forward(self.block, x)
        if self._forward is None:
            self._forward = _compiled(self.source, self.names)
        return self._forward(self.block, x)

    def __getstate__(self) -> dict:
        """Without the compiled function, which cannot be pickled."""
        return {**self.__dict__, "_forward": None}


@dataclass(frozen=True)
class _Import:
    """A module of Python, which neither pickle nor deepcopy takes."""

    name: str


def _compiled(source: str, names: dict):
    scope = {k: import_module(v.name) if isinstance(v, _Import) else v for k, v in names.items()}
    exec(compile(source, "<residual block>", "exec"), scope)
    return scope["forward"]


@dataclass(frozen=True)
class BlockSlot:
    """The place of a forward; hung in and out like a module in its slot."""

    module: nn.Module  # the block as it was
    name: str

    def put(self, forward: FusedBlock | nn.Module) -> None:
        """Give the block this forward; the block itself stands for its own."""
        self.module.__dict__.pop("forward", None)
        if isinstance(forward, FusedBlock):
            self.module.forward = forward


def restore_residuals(model: nn.Module) -> None:
    """Give every block its own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedBlock):
            del module.forward


def residual_sums(model: nn.Module, inputs) -> list[tuple[BlockSlot, FusedBlock]]:
    """Blocks inside of a converted model, in eval mode, whose sums its convolutions can add.

    Each was run on the input it sees in a run of the model, and gave the output of the block as it
    was written, to rounding.
    """
    found: dict[nn.Module, tuple[BlockSlot, FusedBlock]] = {}
    around: set[str] = set()  # names of modules that hold a block that was found
    for name, block in reversed(list(model.named_modules())):  # inner blocks before outer ones
        if not name or name in around or not _is_plain(block):
            continue
        fused = fuse_block(block)
        if fused is not None:
            found[block] = BlockSlot(block, name), fused
            around.update(name[:i] for i, c in enumerate(name) if c == ".")
    right = _compare(model, inputs, {block: fused for block, (_, fused) in found.items()})
    return [pair for block, pair in reversed(found.items()) if block in right]


def _is_plain(block: nn.Module) -> bool:
    """A composed module with a forward of one tensor, which nothing hooks into."""
    if not any(isinstance(m, SparseConv2d) for m in block.modules()) or isinstance(block, _LEAVES):
        return False
    arguments = list(inspect.signature(type(block).forward).parameters.values())[1:]
    single = len(arguments) == 1 and arguments[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    return single and not any(is_hooked(m) for m in block.modules())


_LEAVES = (SparseConv2d, nn.Sequential, nn.ModuleList, nn.ModuleDict)


class _Tracer(fx.Tracer):
    """Looks into modules of the user; those of torch and our layers stay calls."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, SparseConv2d) or super().is_leaf_module(module, name)


def fuse_block(block: nn.Module) -> FusedBlock | None:
    """The forward with sums inside of convolutions; None where it cannot be traced or has none."""
    try:
        graph = _Tracer().trace(block)
    except Exception:  # a forward that asks for values, shapes or packages that fx does not know
        return None
    modules = dict(block.named_modules())
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    if not sum(_fuse_sum(graph, modules, node) for node in list(graph.nodes)):
        return None
    graph.lint()
    code = graph.python_code("self")
    return FusedBlock(block, code.src, code.globals)


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
        fused = graph.call_module(conv.target, arguments)
    last.replace_all_uses_with(fused)
    for old in dict.fromkeys((last, node, conv)):
        graph.erase_node(old)
    return True


def _gives(modules: dict, conv, node: fx.Node) -> bool:
    """Whether `conv` is a call of a sparse convolution that can move to where `node` is."""
    if not isinstance(conv, fx.Node) or conv.op != "call_module" or conv.kwargs:
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


def _compare(model: nn.Module, inputs, blocks: dict[nn.Module, FusedBlock]) -> set[nn.Module]:
    """The blocks that were called, give the same on the inputs of a run, and change no input."""
    equal: dict[nn.Module, bool] = {}
    seen: dict[nn.Module, Tensor] = {}

    def enter(block, args, kwargs):
        seen[block] = args[0].clone() if len(args) == 1 and not kwargs else None

    def leave(block, args, y):
        try:
            before = seen.pop(block)
            got = blocks[block](before)
            tolerance = 1e-4 if y.dtype == torch.float32 else 1e-2
            same = got.shape == y.shape and torch.equal(before, args[0])
            same = same and bool((got - y).abs().max() <= tolerance * y.abs().max())
        except Exception:
            same = False
        equal[block] = equal.get(block, True) and same

    hooks = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]
    hooks += [b.register_forward_hook(leave) for b in blocks]
    try:
        with torch.inference_mode():
            forward_call(model, inputs)()
    except Exception:  # a conversion runs the model again, and says why it failed
        return set()
    finally:
        for hook in hooks:
            hook.remove()
    return {block for block, same in equal.items() if same}
