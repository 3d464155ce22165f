"""The graph of a block's forward, recorded without touching anything but copies of the block.

`torch.fx.symbolic_trace` patches `nn.Module.__call__` for the whole process while it traces, so
that models in other threads fail. Here the forward runs on shallow copies of the block and its
children, whose calls write nodes; the nodes and proxies are those of torch.fx.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .chain import shallow_copy
from .traced_state import State, Unsteady, Watch, autocast

_LEAVES = ("torch.nn.", "torch.ao.nn.", f"{__package__}.")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Trace:
    """What a forward does.

    Attributes:
        graph: The graph; modules by their names in the block.
        size: `(channels, height, width)` of the input it holds for, None where it holds for all.
        inner: Names of the modules whose own forwards are in the graph, without the block itself.
        state: The settings that the forwards read.
    """

    graph: fx.Graph
    size: tuple[int, ...] | None
    inner: tuple[str, ...]
    state: State


def trace(block: nn.Module, example: Tensor | None) -> Trace | None:
    """The graph of a forward of one image.

    A forward that computes with sizes (padding as TensorFlow does it) is traced with those of the
    example, `(1, channels, height, width)`, and holds for them alone; every other one holds for all
    sizes. No graph where a forward asks for values, reads tensors that are neither parameters nor
    buffers, computes from nothing (random numbers, a gradient mode), does or reads more than steps
    can (`traced_state.py`), or where something depends on how many images there are.
    """
    for given in (None,) if example is None else (None, example):
        try:
            tracer = _Tracer(block, given)
            graph = tracer.record()
            state = tracer.watch.finish()
        except Exception:  # a forward that asks for values, sizes or packages that are not known
            continue
        size = None if given is None else tuple(given.shape[1:])
        return Trace(graph, size, tuple(tracer.inner), state)
    return None


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Looks into modules of the user; those of torch and our layers stay calls.

    With an example, what is traced knows its sizes: a node is computed when it is asked for them.
    """

    def __init__(self, block: nn.Module, example: Tensor | None):
        super().__init__(fx.Graph())
        self.block, self.example = block, example
        self.modules = dict(block.named_modules())
        self.inner: list[str] = []
        self.watch = Watch()
        self.computing = False
        self._copies: dict[int, nn.Module] = {}
        self._values: dict[fx.Node, object] = {}

    def record(self) -> fx.Graph:
        """The graph of the forward of the block."""
        name = list(inspect.signature(type(self.block).forward).parameters)[1]
        x = self.create_proxy("placeholder", name, (), {})
        copy = self._copy_of(self.block, "")
        self.watch.around([type(self.modules[name]) for name in ("", *self.inner)])
        with _FromProxiesOnly(self):
            result = type(self.block).forward(copy, x)
        self.create_node("output", "output", (self.create_arg(result),), {})
        for node in reversed(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
        return self.graph

    def _copy_of(self, module: nn.Module, name: str) -> nn.Module:
        """A copy that writes nodes; one for all places where a module hangs."""
        if id(module) in self._copies:
            return self._copies[id(module)]
        copy = self._copies[id(module)] = shallow_copy(module)
        if type(module).__module__.startswith(_LEAVES) and not isinstance(module, _CONTAINERS):
            copy.__dict__["forward"] = partial(self._called, name)
            copy.__dict__["_compiled_call_impl"] = None
            self.watch.over(copy, module)
            return copy
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError("a compiled module is left alone")
        if name:
            self.inner.append(name)
        prefix = f"{name}." if name else ""
        for table in (copy._parameters, copy._buffers):
            for key in (key for key, tensor in table.items() if tensor is not None):
                table[key] = self.create_proxy("get_attr", prefix + key, (), {})
        for key, child in module._modules.items():
            if "." in key:  # names join to a path
                raise ValueError(f"a name with a dot, {key!r}")
            copy._modules[key] = None if child is None else self._copy_of(child, prefix + key)
        self.watch.over(copy, module)
        return copy

    def _called(self, name: str, *args, **kwargs) -> fx.Proxy:
        return self.create_proxy("call_module", name, args, kwargs)

    def create_node(self, *args, **kwargs) -> fx.Node:
        if autocast() != self.watch.autocast:
            raise Unsteady("it switches autocast")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a):
        if isinstance(a, Tensor):
            raise ValueError("a tensor that is neither a parameter nor a buffer")
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return super().proxy(node) if self.example is None else _Sized(node, self)

    def size_of(self, node: fx.Node) -> _Size:
        """Of the result of a node."""
        self.computing = True
        try:
            with torch.no_grad():
                return _Size(self._value(node).shape)
        finally:
            self.computing = False

    def _value(self, node: fx.Node):
        if node not in self._values:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._value)
            self._values[node] = self._run(node, args, kwargs)
        return self._values[node]

    def _run(self, node: fx.Node, args, kwargs):
        if node.op == "placeholder":
            return self.example
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.modules[node.target](*args, **kwargs)
        owner, _, name = node.target.rpartition(".")  # get_attr
        return getattr(self.modules[owner], name)


class _FromProxiesOnly(TorchFunctionMode):
    """Refuses what reads nothing that is traced: its result would be frozen into the graph."""

    def __init__(self, tracer: _Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        traced = any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs)))
        if not traced and not self.tracer.computing:
            raise ValueError(f"{function} reads nothing of the input")
        return function(*args, **kwargs)


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
