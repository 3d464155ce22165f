"""Which layers read the channels that a layer makes, found in the graph of the model.

`torch.fx` traces the model. A layer's channels can be followed as long as every step handles them
one by one (activations, BatchNorm, dropout, pooling) and every path ends in a linear layer or a
convolution; sums, concatenations, attention and outputs of the model end the search.
"""

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import batchnorm, conv, dropout, pooling

from ..chain import is_hooked
from .calibration import evaluating

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
)  # fmt: skip
FUNCTIONS = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.softplus, F.hardtanh,
    F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh,
}  # fmt: skip
METHODS = {"relu", "relu_", "sigmoid", "tanh"}
# A channel that is constant stays so behind these, and the others stay where they are.
POOL_MODULES = (pooling._MaxPoolNd, pooling._AdaptiveMaxPoolNd, pooling._AdaptiveAvgPoolNd)
POOLS = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
}  # fmt: skip


@dataclass(frozen=True)
class Link:
    """The way of a layer's channels to one reader.

    Attributes:
        name: The reader's name.
        reader: A linear layer, or a convolution of one group.
        steps: What changes values in between, in order: modules and functions of a tensor.
        positions: Consecutive inputs of the reader that belong to one channel (after a flatten).
    """

    name: str
    reader: nn.Module
    steps: tuple[Callable, ...] = ()
    positions: int = 1

    def by_channel(self, tensor: Tensor) -> Tensor:
        """See the reader's weight, or what has its shape, as `(out, channels, ...)`; a view."""
        return tensor if tensor.ndim > 2 else tensor.unflatten(1, (-1, self.positions))

    @property
    def columns(self) -> Tensor:
        """The reader's weight by channel, sharing memory."""
        return self.by_channel(self.reader.weight.detach())

    @property
    def pads_with_zeros(self) -> bool:
        """Whether the reader sees zeros around its input, so that a constant does not stay one."""
        if not isinstance(self.reader, conv._ConvNd) or self.reader.padding_mode != "zeros":
            return False
        return any(self.reader._reversed_padding_repeated_twice)


@dataclass(frozen=True)
class Source:
    """A layer all of whose readers are known.

    Attributes:
        name: Its name.
        layer: A linear layer or a convolution.
        links: The way to each reader, at least one.
    """

    name: str
    layer: nn.Module
    links: tuple[Link, ...]

    def constants(self, link: Link) -> Tensor:
        """What the reader gets of channels without inputs, `(channels,)` float64, in eval mode."""
        layer = self.layer
        values = layer.weight.new_zeros(layer.weight.shape[0])
        values = values if layer.bias is None else layer.bias.detach()
        values = values.reshape(1, -1, *[1] * (layer.weight.ndim - 2)).clone()
        for step in link.steps:
            with evaluating(step) if isinstance(step, nn.Module) else torch.no_grad():
                values = step(values.clone())
        return values.flatten().double()


def find_sources(where: str, model: nn.Module) -> list[Source]:
    """List the layers whose channels can be followed to all their readers, in order of the calls.

    Layers that are called twice, share their weight or compute it are left out.

    Args:
        where: Name of the caller, for errors.
        model: Any module; left as it is.

    Raises:
        TypeError: The model is no module.
        ValueError: torch.fx cannot trace the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: expected a torch.nn.Module, got {type(model).__name__}")
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{where}: expected a model that torch.fx can trace, got {reason}"
        ) from error
    search = _Search(model, graph)
    found = []
    for node in graph.nodes:
        layer = search.layer(node)
        links = search.follow(node, layer) if layer is not None else None
        if links:
            found.append(Source(node.target, layer, tuple(links)))
    return found


class _Search:
    def __init__(self, model: nn.Module, graph: fx.Graph):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        nodes = [node for node in graph.nodes if node.op == "call_module"]
        self.calls = Counter(id(self.modules[node.target]) for node in nodes)
        # Whatever else holds or reads a weight: tied layers, and F.linear(x, layer.weight).
        self.owners = Counter(
            id(p) for m in model.modules() for p in m._parameters.values() if p is not None
        )
        for node in graph.nodes:
            if node.op == "get_attr":
                self.owners[id(operator.attrgetter(node.target)(model))] += 1

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The linear layer or convolution that a node calls, if no other call or owner is there."""
        module = self.module(node)
        kinds = type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        if not kinds or self.calls[id(module)] != 1 or "weight" not in module._parameters:
            return None
        own = [p for p in module._parameters.values() if p is not None]
        if is_hooked(module):
            return None
        return module if all(self.owners[id(p)] == 1 for p in own) else None

    def follow(self, node, layer, steps=(), flat=False) -> list[Link] | None:
        """Every way from a node to a reader; None if one of them leads elsewhere."""
        links: list[Link] = []
        for user in node.users:
            if len(node.users) > 1 and self._in_place(user):
                return None
            link = self._reader(node, user, layer, steps, flat)
            step = None if link else self._step(node, user, layer, flat)
            if step == "flatten":
                found = self.follow(user, layer, steps, True)
            elif step is not None:
                found = self.follow(user, layer, steps + step, flat)
            else:
                found = [link] if link else None
            if found is None:
                return None
            links += found
        return links or None

    def _reader(self, node, user, layer, steps, flat) -> Link | None:
        reader = self.layer(user)
        if reader is None or user.args != (node,) or user.kwargs:
            return None
        channels, positions = layer.weight.shape[0], 1
        if isinstance(reader, nn.Linear):
            # A convolution's channels are the last dimension only after a flatten.
            if isinstance(layer, conv._ConvNd) != flat or reader.in_features % channels:
                return None
            positions = reader.in_features // channels
        elif flat or isinstance(layer, nn.Linear) or reader.groups != 1:
            return None
        return Link(user.target, reader, steps, positions)

    def _step(self, node, user, layer, flat) -> tuple | str | None:
        """Values change by these callables on the way through `user`; None if it is unknown."""
        if user.all_input_nodes != [node] or not user.args or user.args[0] is not node:
            return None
        is_map = isinstance(layer, conv._ConvNd) and not flat
        if user.op == "call_module":
            module = self.module(user)
            # The order of a BatchNorm's channels must be nobody else's.
            alone = self.calls[id(module)] == 1 or not isinstance(module, batchnorm._BatchNorm)
            plain = alone and not is_hooked(module)
            return _step_of_module(module, layer.weight.shape[0], is_map, flat) if plain else None
        if user.target in (torch.flatten, "flatten"):
            return "flatten" if is_map and user.args[1:] == (1,) and not user.kwargs else None
        if user.target in (METHODS if user.op == "call_method" else FUNCTIONS):
            return (_Function(user),)
        is_dropout = user.target in (F.dropout, F.dropout2d)
        return () if is_dropout or (is_map and user.target in POOLS) else None

    def _in_place(self, user) -> bool:
        module = self.module(user)
        inside = getattr(module, "inplace", False) or user.kwargs.get("inplace", False)
        return bool(inside) or str(user.target).endswith("_")


def _step_of_module(module: nn.Module, channels: int, is_map: bool, flat: bool):
    """As `_Search._step`; `is_map`: channels are dimension 1 of a convolution's output."""
    if isinstance(module, nn.Flatten):
        return "flatten" if is_map and (module.start_dim, module.end_dim) == (1, -1) else None
    if type(module) in ACTIVATIONS:
        return (module,)
    if isinstance(module, batchnorm._BatchNorm):
        fits = module.num_features == channels and module.track_running_stats and not flat
        return (module,) if fits else None
    if isinstance(module, pooling._AvgPoolNd):
        around = module.padding if isinstance(module.padding, tuple) else (module.padding,)
        return () if is_map and not any(around) else None
    if isinstance(module, POOL_MODULES):
        return () if is_map else None
    return () if isinstance(module, nn.Identity | dropout._DropoutNd) else None


class _Function:
    """A call of an elementwise function with the arguments it has in the graph."""

    def __init__(self, node: fx.Node):
        self.target, self.args, self.kwargs = node.target, node.args[1:], dict(node.kwargs)

    def __call__(self, values: Tensor) -> Tensor:
        if isinstance(self.target, str):
            return getattr(values, self.target)(*self.args, **self.kwargs)
        return self.target(values, *self.args, **self.kwargs)
