"""A graph of torch.fx as a list of steps: data that is run, never source that is compiled.

Names of modules come from the user and from files; nothing here turns one into code.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass

from torch import fx, nn


@dataclass(frozen=True)
class _Result:
    """Stands in the arguments of a step for what an earlier one gave."""

    index: int


@dataclass(frozen=True)
class Step:
    """One node of a graph.

    Attributes:
        kind: `call_function`, `call_method`, `call_module`, `get_attr` or `output`.
        target: The function, the name of the method, or the path of a module or tensor.
        args: Positional arguments.
        kwargs: Keyword arguments.
        flat: Whether results stand in `args` only, none of them inside of a list or a slice.
        done: Results that no later step reads, dropped to free their memory.
    """

    kind: str
    target: object
    args: tuple
    kwargs: dict
    flat: bool
    done: tuple[int, ...]


def steps_of(graph: fx.Graph) -> tuple[Step, ...] | None:
    """The steps of a graph of one input; None where they could not be pickled with the model."""
    nodes = list(graph.nodes)
    number = {node: index for index, node in enumerate(nodes)}
    last = {node: max((number[user] for user in node.users), default=0) for node in nodes}
    steps = tuple(
        _step(node, number, tuple(number[n] for n in nodes[:i] if last[n] == i))
        for i, node in enumerate(nodes)
        if node.op != "placeholder"
    )
    try:
        pickle.dumps(steps)
    except Exception:  # a function of no module
        return None
    return steps


def _step(node: fx.Node, number: dict[fx.Node, int], done: tuple[int, ...]) -> Step:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Result(number[n]))
    inside = {n for arg in node.args if not isinstance(arg, fx.Node) for n in _nodes(arg)}
    flat = not inside and not _nodes(dict(node.kwargs))
    paths = node.op in ("call_module", "get_attr")
    target = tuple(node.target.split(".")) if paths else node.target
    return Step(node.op, target, tuple(args), dict(kwargs), flat, done)


def _nodes(tree) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(tree, found.append)
    return found


def run(steps: tuple[Step, ...], block: nn.Module, x):
    """What the graph gives for an input, with the modules and tensors that hang in `block` now."""
    values = [x]
    for step in steps:
        if step.flat:
            args = [values[a.index] if type(a) is _Result else a for a in step.args]
            kwargs = step.kwargs
        else:
            args, kwargs = _filled(step.args, values), _filled(step.kwargs, values)
        for index in step.done:
            values[index] = None
        if step.kind == "call_module":
            y = at(block, step.target)(*args, **kwargs)
        elif step.kind == "call_function":
            y = step.target(*args, **kwargs)
        elif step.kind == "call_method":
            y = getattr(args[0], step.target)(*args[1:], **kwargs)
        elif step.kind == "get_attr":
            y = getattr(at(block, step.target[:-1]), step.target[-1])
        else:
            return args[0]
        del args  # so that a result nobody reads again is freed
        values.append(y)


def at(block: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """The module of a path, None where there is none."""
    for name in path:
        block = block._modules.get(name)
        if block is None:
            return None
    return block


def _filled(tree, values: list):
    """Arguments with results in the place of their stand-ins."""
    if isinstance(tree, _Result):
        return values[tree.index]
    if isinstance(tree, (tuple, list)):
        filled = [_filled(entry, values) for entry in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*filled)
        return tuple(filled) if isinstance(tree, tuple) else filled
    if isinstance(tree, dict):
        return {key: _filled(entry, values) for key, entry in tree.items()}
    if isinstance(tree, slice):
        return slice(*(_filled(entry, values) for entry in (tree.start, tree.stop, tree.step)))
    return tree
