"""Dead neurons: units that no input reaches, or that nobody reads."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .links import Link, Source, find_sources
from .slots import mask_beside
from .targets import check_ignore, ignores


@dataclass(frozen=True)
class DeadNeurons:
    """What `remove_dead_neurons` found.

    Attributes:
        without_inputs: Units by layer name whose weights were all 0; their constant output is in
            the biases of their readers now.
        without_outputs: Units by layer name whose output was multiplied by zeros alone.
        left: Units without inputs that stay, by layer name: how many, and why.
    """

    without_inputs: dict[str, int]
    without_outputs: dict[str, int]
    left: dict[str, str]


@torch.no_grad()
def remove_dead_neurons(
    model: nn.Module, ignore: str | type | Iterable[str | type] = ()
) -> DeadNeurons:
    """Set everything that goes in and out of dead units to zero; outputs in eval mode stay.

    Han et al. 2015, arXiv:1506.02626, section 3.5. A unit (neuron or output channel) without inputs
    gives a constant: what the bias becomes on its way through activation and BatchNorm. That goes
    into the biases of the layers that read it, and the weights there and the bias become 0. Of a
    unit that nobody reads, weights and bias become 0. Repeated until nothing changes, as one death
    brings about others. Masks of a `Pruner` follow, so that training does not revive them.

    Units are found where `torch.fx` can follow them to all their readers: linear layers and
    convolutions behind activations, BatchNorm, dropout, pooling and flatten. What goes into a sum
    (a residual connection) stays alive.

    Args:
        model: Any module that torch.fx can trace; changed in place.
        ignore: Layers of which no unit is taken, as for `prune`.

    Returns:
        How many units died, and which could not be taken.

    Raises:
        ValueError: torch.fx cannot trace the model, or `ignore` matches nothing.
        TypeError: An argument of the wrong type.
    """
    sources = find_sources("remove_dead_neurons", model)
    entries, modules = check_ignore(model, ignore), dict(model.named_modules())
    sources = [s for s in sources if not any(ignores(e, s.name, modules[s.name]) for e in entries)]
    result = DeadNeurons({}, {}, {})
    changed = True
    while changed:
        taken = [_take_unread(s, result) or _take_constant(s, result) for s in sources]
        changed = any(taken)
    for source in sources:
        _explain(source, result)
    return result


def _silent(source: Source) -> Tensor:
    """Units without inputs, boolean `(channels,)`."""
    return ~source.layer.weight.detach().flatten(1).any(1)


def _is_read(source: Source) -> Tensor:
    """Units that a reader has a nonzero weight for, boolean `(channels,)`."""
    return torch.stack([link.columns.flatten(2).any(2).any(0) for link in source.links]).any(0)


def _count(counts: dict[str, int], name: str, units: Tensor) -> bool:
    number = int(units.count_nonzero())
    if number:
        counts[name] = counts.get(name, 0) + number
    return number > 0


def _take_unread(source: Source, result: DeadNeurons) -> bool:
    layer = source.layer
    alive = layer.weight.flatten(1).any(1)
    if layer.bias is not None:
        alive = alive | (layer.bias != 0)
    dead = alive & ~_is_read(source)
    _clear(layer, lambda weight: weight, dead, 0)
    if layer.bias is not None:
        layer.bias.masked_fill_(dead, 0)
    return _count(result.without_outputs, source.name, dead)


def _take_constant(source: Source, result: DeadNeurons) -> bool:
    """Fold the constants of units without inputs, where every reader can take them."""
    dead = _silent(source) & _is_read(source)
    constants = [source.constants(link) for link in source.links]
    for link, values in zip(source.links, constants):
        dead &= _foldable(link, values)
    if not bool(dead.any()):
        return False
    for link, values in zip(source.links, constants):
        if link.reader.bias is not None:
            shift = link.columns.flatten(2).double().sum(2) @ values.where(dead, 0)
            link.reader.bias.copy_(link.reader.bias.double() + shift)
        _clear(link.reader, link.by_channel, dead, 1)
    if source.layer.bias is not None:
        source.layer.bias.masked_fill_(dead, 0)
    return _count(result.without_inputs, source.name, dead)


def _foldable(link: Link, values: Tensor) -> Tensor:
    if link.pads_with_zeros or link.reader.bias is None:
        return values == 0
    return torch.isfinite(values)


def _clear(layer: nn.Module, view: Callable[[Tensor], Tensor], dead: Tensor, axis: int) -> None:
    """Set what `view` shows of a weight to 0 where `dead`, and take it out of the mask."""
    mask = mask_beside(layer)
    for tensor in (layer.weight,) if mask is None else (layer.weight, mask):
        shown = view(tensor)
        shape = [-1 if d == axis else 1 for d in range(shown.ndim)]
        shown.masked_fill_(dead.view(shape), 0)


def _explain(source: Source, result: DeadNeurons) -> None:
    left = _silent(source) & _is_read(source)
    if not bool(left.any()):
        return
    reasons = []
    for link in source.links:
        if not bool((left & ~_foldable(link, source.constants(link))).any()):
            continue
        if link.pads_with_zeros:
            reasons.append(f"{link.name!r} pads its input with zeros")
        elif link.reader.bias is None:
            reasons.append(f"{link.name!r} has no bias")
        else:
            reasons.append(f"{link.name!r} would get a constant that is not finite")
    result.left[source.name] = f"{int(left.count_nonzero())}: {', '.join(reasons)}"
