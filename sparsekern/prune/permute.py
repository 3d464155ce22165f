"""Permuting channels so that an N:M pattern loses less."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..patterns import NM, parse
from ..patterns_nm import TransposableNM
from .links import Source, find_sources
from .slots import MASK
from .targets import check_ignore, ignores

LEAST_GAIN = 1e-9  # of what is kept in all; less is rounding


@torch.no_grad()
def permute_channels(
    model: nn.Module,
    pattern: str | NM = "2:4",
    rounds: int = 100,
    ignore: str | type | Iterable[str | type] = (),
) -> dict[str, tuple[float, float]]:
    """Reorder hidden channels so that N:M pruning keeps more of the magnitudes.

    Pool & Yu 2021, "Channel permutations for N:M sparsity" (NeurIPS): the model computes the same
    before and after, as the layer that makes the channels and all that read them are permuted
    alike; but other weights share a group. Do it before pruning, and before an optimizer has
    momentum. Greedy: in every round the best swaps of two channels between groups, until none
    helps. A round costs about `channels^2 * rows` operations for what has changed: 1536 channels
    and 384 rows take about a minute on one core.

    Channels are permuted where `torch.fx` can follow them to all their readers, as for
    `remove_dead_neurons`, without a flatten in between.

    Args:
        model: Any module that torch.fx can trace; changed in place.
        pattern: An N:M pattern.
        rounds: Most rounds for each layer, >= 1.
        ignore: Layers whose outputs keep their order, as for `prune`.

    Returns:
        For each layer whose outputs were reordered: the share of the readers' magnitudes that the
        pattern keeps, before and after.

    Raises:
        ValueError: Another pattern, rounds below 1, a model with masks, or as for
            `remove_dead_neurons`.
        TypeError: An argument of the wrong type.
    """
    pattern = parse(pattern)
    if not isinstance(pattern, NM) or isinstance(pattern, TransposableNM):
        raise ValueError(f"permute_channels: expected an N:M pattern, got {pattern}")
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(f"permute_channels: expected rounds to be an int >= 1, got {rounds!r}")
    sources = find_sources("permute_channels", model)
    entries, modules = check_ignore(model, ignore), dict(model.named_modules())
    for name, module in modules.items():
        if MASK in module._buffers:
            got = f"one on layer {name!r}"
            raise ValueError(f"permute_channels: expected a model without masks, got {got}")
    kept = {}
    for source in sources:
        if any(ignores(e, source.name, modules[source.name]) for e in entries):
            continue
        if _is_permutable(source, pattern):
            rows = [la.columns.flatten(2).transpose(1, 2).flatten(0, 1) for la in source.links]
            scores = torch.cat(rows).abs().double()
            order = best_order(scores, pattern.n, pattern.m, rounds)
            before, after = _share(scores, pattern), _share(scores[:, order], pattern)
            if after > before:
                _permute(source, order)
                kept[source.name] = before, after
    return kept


def best_order(scores: Tensor, n: int, m: int, rounds: int) -> Tensor:
    """Order of columns in which the N largest of every M of a row add up to more.

    Args:
        scores: `(rows, columns)` float64, not negative; columns are a multiple of M.
        n: Kept of each group.
        m: Size of a group.
        rounds: Most rounds of swaps.

    Returns:
        int64 `(columns,)`; the present order if no swap helps.
    """
    count = scores.shape[1]
    order = torch.arange(count, device=scores.device)
    group = order // m
    # What a group keeps if column c takes the place of the column in slot j, `(slots, columns)`.
    swapped = scores.new_zeros(count, count)
    changed, least = torch.unique(group), LEAST_GAIN * float(scores.sum())
    for _ in range(rounds):
        slots = (changed[:, None] * m + torch.arange(m, device=scores.device)).flatten()
        swapped[slots] = _kept_with(scores, order[slots], n, m)
        now = swapped[:, order]  # by slot and slot
        own = now.diagonal()
        gain = now + now.T - own[:, None] - own
        gain = gain.masked_fill(group[:, None] >= group, 0).flatten()
        best = (gain > least).nonzero().flatten()
        best = best[gain[best].argsort(descending=True, stable=True)].tolist()
        pairs = _disjoint([divmod(index, count) for index in best], m)
        if not pairs:
            break
        for a, b in pairs:
            order[[a, b]] = order[[b, a]]
        changed = torch.tensor(sorted({slot // m for pair in pairs for slot in pair}))
        changed = changed.to(scores.device)
    return order


def _kept_with(scores: Tensor, columns: Tensor, n: int, m: int) -> Tensor:
    """What a group keeps with any column in the place of each of its own, `(slots, columns)`.

    With x in the place of a column, a row keeps the N - 1 largest of the others and the larger of x
    and their N-th; and `sum max(t, x) = (sum t + sum x + sum |t - x|) / 2`.
    """
    groups = scores[:, columns].unflatten(1, (-1, m))
    others = [[i for i in range(m) if i != j] for j in range(m)]
    rest = groups[:, :, torch.tensor(others, device=scores.device)]  # (rows, groups, m, m - 1)
    best = rest.topk(n, dim=3).values.flatten(1, 2)
    fixed, last = best[:, :, : n - 1].sum((0, 2)), best[:, :, n - 1].T.contiguous()
    distance = torch.cdist(last, scores.T.contiguous(), p=1)
    return fixed[:, None] + (last.sum(1)[:, None] + scores.sum(0) + distance) / 2


def _disjoint(pairs, m: int) -> list[tuple[int, int]]:
    """The first pairs of slots of which none shares a group with one before."""
    taken: set[int] = set()
    chosen = []
    for a, b in pairs:
        if not taken & {a // m, b // m}:
            taken |= {a // m, b // m}
            chosen.append((a, b))
    return chosen


def _share(scores: Tensor, pattern: NM) -> float:
    best = scores.unflatten(1, (-1, pattern.m)).topk(pattern.n, dim=2).values
    return float(best.sum() / scores.sum().clamp_min(torch.finfo(scores.dtype).tiny))


def _is_permutable(source: Source, pattern: NM) -> bool:
    direct = all(link.positions == 1 for link in source.links)
    one_group = getattr(source.layer, "groups", 1) == 1
    return direct and one_group and source.layer.weight.shape[0] % pattern.m == 0


def _permute(source: Source, order: Tensor) -> None:
    norms = {step for link in source.links for step in link.steps if isinstance(step, _BatchNorm)}
    for module in (source.layer, *norms):
        tensors = {**module._parameters, **module._buffers}
        for tensor in tensors.values():
            if tensor is not None and tensor.ndim > 0:
                tensor.copy_(tensor[order])
    for link in source.links:
        link.columns.copy_(link.columns[:, order])
