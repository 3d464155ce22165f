"""The graph of a block's forward, by torch.fx."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from .nn import SparseConv2d


def trace(block: nn.Module, example: Tensor | None) -> tuple[fx.Graph, tuple | None] | None:
    """The graph of a forward of one image, and the `(channels, height, width)` it holds for.

    A forward that computes with sizes (padding as TensorFlow does it) is traced with those of the
    example, `(1, channels, height, width)`, and holds for them alone; every other one holds for all
    sizes (None). No graph where fx cannot follow, or where something depends on how many images
    there are.
    """
    try:
        return _Tracer(None).trace(block), None
    except Exception:  # a forward that asks for values, sizes or packages that fx does not know
        pass
    if example is None:
        return None
    try:
        graph = _Tracer(example).trace(block)
    except Exception:
        return None
    return graph, tuple(example.shape[1:])


class _Tracer(fx.Tracer):
    """Looks into modules of the user; those of torch and our layers stay calls.

    With an example, what is traced knows its sizes: a node is computed when it is asked for them.
    """

    def __init__(self, example: Tensor | None):
        super().__init__()
        self._example, self._values, self._computing = example, {}, False

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, SparseConv2d) or super().is_leaf_module(module, name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return super().proxy(node) if self._example is None else _Sized(node, self)

    def call_module(self, module, forward, args, kwargs):
        if self._computing:
            return forward(*args, **kwargs)
        return super().call_module(module, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if self._computing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def size_of(self, node: fx.Node) -> _Size:
        """Of the result of a node."""
        self._computing = True
        try:
            with torch.no_grad():
                return _Size(self._value(node).shape)
        finally:
            self._computing = False

    def _value(self, node: fx.Node):
        if node not in self._values:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._value)
            self._values[node] = self._run(node, args, kwargs)
        return self._values[node]

    def _run(self, node: fx.Node, args, kwargs):
        if node.op == "placeholder":
            return self._example
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.root.get_submodule(node.target)(*args, **kwargs)
        owner, _, name = node.target.rpartition(".")  # get_attr
        return getattr(self.root.get_submodule(owner), name)


class _Sized(fx.Proxy):
    """A traced tensor of known sizes."""

    @property
    def shape(self) -> _Size:
        """Numbers, but for the number of images."""
        return self.tracer.size_of(self.node)

    def size(self, dim: int | None = None):
        """As `torch.Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    ndim = property(dim)


class _Size(tuple):
    """A shape whose first entry nobody may read, as batches differ."""

    def __getitem__(self, index):
        picked = range(len(self))[index]
        if 0 in (picked if isinstance(picked, range) else [picked]):
            raise ValueError("the number of images is not known")
        return super().__getitem__(index)

    def __iter__(self):
        raise ValueError("the number of images is not known")
