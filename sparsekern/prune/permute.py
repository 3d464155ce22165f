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
CHEAP, DRAWN = 200, 24  # swaps that cost least, and how many of them an escape draws
KICK = 8  # most swaps of an escape: one alone is mostly taken back by the next round


@torch.no_grad()
def permute_channels(
    model: nn.Module,
    pattern: str | NM = "2:4",
    rounds: int = 100,
    escapes: int = 20,
    ignore: str | type | Iterable[str | type] = (),
) -> dict[str, tuple[float, float]]:
    """Reorder hidden channels so that N:M pruning keeps more of the magnitudes.

    Pool & Yu 2021, "Channel permutations for N:M sparsity" (NeurIPS): the model computes the same
    before and after, as the layer that makes the channels and all that read them are permuted
    alike; but other weights share a group. Do it before pruning, and before an optimizer has
    momentum. Greedy: in every round the best swaps of two channels between groups, until none
    helps. Then, as often as `escapes` says, a few swaps among those that lose least lead out of the
    local optimum, and on it goes from there; what ends lower is taken back. A round costs about
    `channels^2 * rows` operations for what has changed: 1536 channels and 384 rows take about a
    minute on one core, and as long again for 20 escapes.

    Channels are permuted where `torch.fx` can follow them to all their readers, as for
    `remove_dead_neurons`, without a flatten in between.

    Args:
        model: Any module that torch.fx can trace; changed in place.
        pattern: An N:M pattern.
        rounds: Most rounds in a row for each layer, >= 1.
        escapes: How often to escape for each layer, >= 0.
        ignore: Layers whose outputs keep their order, as for `prune`.

    Returns:
        For each layer whose outputs were reordered: the share of the readers' magnitudes that the
        pattern keeps, before and after.

    Raises:
        ValueError: Another pattern, rounds or escapes out of range, a model with masks, or as for
            `remove_dead_neurons`.
        TypeError: An argument of the wrong type.
    """
    pattern = parse(pattern)
    if not isinstance(pattern, NM) or isinstance(pattern, TransposableNM):
        raise ValueError(f"permute_channels: expected an N:M pattern, got {pattern}")
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(f"permute_channels: expected rounds to be an int >= 1, got {rounds!r}")
    if not isinstance(escapes, int) or isinstance(escapes, bool) or escapes < 0:
        raise ValueError(f"permute_channels: expected escapes to be an int >= 0, got {escapes!r}")
    sources = find_sources("permute_channels", model)
    entries, modules = check_ignore(model, ignore), dict(model.named_modules())
    for name, module in modules.items():
        if hasattr(module, MASK):
            got = f"one on layer {name!r}"
            raise ValueError(f"permute_channels: expected a model without masks, got {got}")
    kept = {}
    for source in sources:
        if any(ignores(e, source.name, modules[source.name]) for e in entries):
            continue
        if _is_permutable(source, pattern):
            rows = [la.columns.flatten(2).transpose(1, 2).flatten(0, 1) for la in source.links]
            scores = torch.cat(rows).abs().double()
            order = best_order(scores, pattern.n, pattern.m, rounds, escapes)
            before, after = _share(scores, pattern), _share(scores[:, order], pattern)
            if after > before:
                _permute(source, order)
                kept[source.name] = before, after
    return kept


def best_order(scores: Tensor, n: int, m: int, rounds: int, escapes: int = 0) -> Tensor:
    """Order of columns in which the N largest of every M of a row add up to more.

    Args:
        scores: `(rows, columns)` float64, not negative; columns are a multiple of M.
        n: Kept of each group.
        m: Size of a group.
        rounds: Most rounds of swaps in a row.
        escapes: How often to leave a local optimum; what then ends lower is taken back.

    Returns:
        int64 `(columns,)`; the present order if no swap helps.
    """
    search = _Search(scores, n, m)
    search.climb(rounds)
    if scores.shape[1] == m:
        return search.order
    generator, best = torch.Generator().manual_seed(0), search.state()
    for _ in range(escapes):
        search.swap(search.cheap_pairs(generator))
        search.climb(rounds)
        if search.kept > best[0] + search.least:
            best = search.state()
        else:
            search.restore(best)
    return search.order


class _Search:
    """Greedy swaps of two columns between groups.

    Attributes:
        order: int64 `(columns,)`.
        least: Smallest gain that counts.
    """

    def __init__(self, scores: Tensor, n: int, m: int):
        self.scores, self.n, self.m, self.count = scores, n, m, scores.shape[1]
        self.order = torch.arange(self.count, device=scores.device)
        self.group = self.order // m
        # What a group keeps if column c takes the place of the column in slot j.
        self.swapped = scores.new_zeros(self.count, self.count)
        self.least = LEAST_GAIN * float(scores.sum())
        self._measure(range(self.count // m))

    @property
    def kept(self) -> float:
        """What all groups keep."""
        own = self.swapped.gather(1, self.order[:, None])
        return float(own[:: self.m].sum())

    def state(self) -> tuple[float, Tensor, Tensor]:
        """Give what `restore` takes."""
        return self.kept, self.order.clone(), self.swapped.clone()

    def restore(self, state: tuple[float, Tensor, Tensor]) -> None:
        """Go back to a state."""
        _, order, swapped = state
        self.order.copy_(order)
        self.swapped.copy_(swapped)

    def climb(self, rounds: int) -> None:
        """Make the best disjoint swaps in every round, until none helps."""
        for _ in range(rounds):
            pairs = self._gainful_pairs()
            if not pairs:
                return
            self.swap(pairs)

    def swap(self, pairs) -> None:
        """Swap pairs of slots, of which no two share a group."""
        for a, b in pairs:
            self.order[[a, b]] = self.order[[b, a]]
        self._measure(sorted({slot // self.m for pair in pairs for slot in pair}))

    def cheap_pairs(self, generator: torch.Generator) -> list[tuple[int, int]]:
        """Draw disjoint swaps among those that cost least."""
        gain = self._gains()
        cheap = gain.topk(min(CHEAP, int(gain.isfinite().sum()))).indices.tolist()
        drawn = torch.randperm(len(cheap), generator=generator)[:DRAWN].tolist()
        return _disjoint([divmod(cheap[i], self.count) for i in drawn], self.m)[:KICK]

    def _gains(self) -> Tensor:
        """What every swap gains, `(slots * slots,)`; -inf but for one of each pair."""
        now = self.swapped[:, self.order]  # by slot and slot
        own = now.diagonal()
        gain = now + now.T - own[:, None] - own
        return gain.masked_fill(self.group[:, None] >= self.group, -torch.inf).flatten()

    def _gainful_pairs(self) -> list[tuple[int, int]]:
        gain = self._gains()
        best = (gain > self.least).nonzero().flatten()
        best = best[gain[best].argsort(descending=True, stable=True)].tolist()
        return _disjoint([divmod(index, self.count) for index in best], self.m)

    def _measure(self, groups) -> None:
        changed = torch.tensor(list(groups), device=self.scores.device)
        slots = (
            changed[:, None] * self.m + torch.arange(self.m, device=self.scores.device)
        ).flatten()
        self.swapped[slots] = _kept_with(self.scores, self.order[slots], self.n, self.m)


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
