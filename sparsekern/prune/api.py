"""One-shot pruning: `prune` and the report it returns."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..patterns import NM, Pattern, parse
from ..ranking import check_sparsity, kept_weights
from .allocation import Budget, allocate, check_scope, rank_globally
from .calibration import Calibration, evaluating, read_batches
from .methods import make_method
from .methods.base import Method, zero_out
from .report import PruneReport, make_report
from .targets import Layer, find_layers, restored_on_error

DEFAULT_SPARSITY = 0.9


def prune(
    model: nn.Module,
    method: str = "magnitude",
    sparsity: float | None = None,
    pattern: str | Pattern = "unstructured",
    scope: str | Mapping[str, float] | None = None,
    data: Iterable | None = None,
    loss_fn=None,
    targets: type | Sequence[type] = (nn.Linear, nn.Conv2d),
    ignore: str | type | Iterable[str | type] = (),
    **method_options,
) -> PruneReport:
    """Set the least important weights of a model to zero, in place.

    Everything is checked before anything changes, and a failure on the way puts the weights back.
    The result is deterministic: equal scores are decided by index.

    Args:
        model: Any module; a single layer has the name "". Layers stay on their devices. A weight
            that several modules share is pruned once.
        method: `"magnitude"`, `"random"`, `"wanda"` or `"sparsegpt"`.
        sparsity: Share of zeros in [0, 1) over the pruned weights; default 0.9, or what an N:M
            pattern fixes (then any other value is an error).
        pattern: Pattern or its string, see `sparsekern.patterns.parse`.
        scope: `"global"` ranks the units of all layers together, `"uniform"` prunes every layer
            alike, `"erk"` by the Erdos-Renyi-kernel rule; exact to one unit, in total for global
            and erk, per layer for uniform. A dict gives `{layer name or glob: sparsity}`; layers it
            does not name get `sparsity`, or stay dense without one. Default: the method's own.
            Every layer keeps at least one unit. N:M prunes every layer alike under any scope.
        data: Calibration data for methods that need it: an iterable of inputs or of
            `(input, target)`, an input being a tensor, a tuple of positional inputs, or a dict of
            keyword inputs. With a dict that holds an `attention_mask`, padding does not count.
        loss_fn: `loss_fn(output, target)` for methods that score by gradients; others ignore it.
        targets: Layer types to prune; `nn.Linear` includes transformers' `Conv1D`.
        ignore: Layers to leave alone, by name, glob, name of a module around them, or type.
        **method_options: Fields of the method's class, as `seed=` or `percdamp=`.

    Returns:
        The report. Layers the pattern cannot divide are left out, with the reason.

    Raises:
        ValueError: A bad value, no prunable layer, weights that are NaN, Inf or on meta, missing
            data, or a Hessian that cannot be factored.
        TypeError: An argument of the wrong type, or an unknown method option.
    """
    chosen, pattern = make_method(method, method_options), parse(pattern)
    _check_sparsity(sparsity, pattern)
    if reason := chosen.misfit(pattern):
        raise ValueError(f"prune: {reason}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"prune: expected loss_fn to be callable, got {type(loss_fn).__name__}")
    scope = chosen.scope if scope is None else scope
    layers, skipped = find_layers(model, targets, ignore, pattern)
    check_scope(scope, layers, pattern)
    if sparsity is None and not isinstance(scope, Mapping):
        sparsity = pattern.sparsity if isinstance(pattern, NM) else DEFAULT_SPARSITY
    job = _Job(chosen, pattern, scope, sparsity, layers)
    if chosen.statistic is None:
        job.prune_at_once()
    elif data is None:
        raise ValueError(f"prune: expected data, which method {method!r} needs, got None")
    else:
        job.prune_in_stages(model, read_batches(data))
    return make_report(method, pattern, scope, layers, skipped)


def _check_sparsity(sparsity: float | None, pattern: Pattern) -> None:
    if sparsity is not None:
        check_sparsity("prune", sparsity)
        if isinstance(pattern, NM):
            pattern.check_agrees("prune", sparsity)


@dataclass(frozen=True)
class _Job:
    method: Method
    pattern: Pattern
    scope: str | Mapping[str, float]
    sparsity: float | None
    layers: list[Layer]

    @property
    def ranks_globally(self) -> bool:
        return self.scope == "global" and not isinstance(self.pattern, NM)

    def prune_at_once(self) -> None:
        """Choose all masks from the weights as they are, then apply them."""
        if self.ranks_globally:
            scores = [self.method.unit_scores(layer, self.pattern).cpu() for layer in self.layers]
            units = self._rank(scores)
            shapes = [layer.weight.shape for layer in self.layers]
            masks = [self.pattern.expand(u, s) for u, s in zip(units, shapes, strict=True)]
        else:
            masks = self._each_layer(self.method.mask, range(len(self.layers)), self._budget(), {})
        for layer, mask in zip(self.layers, masks, strict=True):
            zero_out(layer, mask)

    def prune_in_stages(self, model: nn.Module, batches) -> None:
        """Prune stage by stage on calibration data; global budgets come from a first dense run."""
        with evaluating(model), restored_on_error(self.layers):
            runs = Calibration(model, self.layers, batches, self.method.sequential)
            budget = self._global_budget(runs) if self.ranks_globally else self._budget()
            for stage in runs.stages:
                totals = runs.gather(stage, self.method.statistic)
                self._each_layer(self.method.prune_layer, stage, budget, totals)

    def _budget(self) -> Budget:
        return allocate(self.scope, self.layers, self.pattern, self.sparsity)

    def _global_budget(self, runs: Calibration) -> Budget:
        scores: dict[int, Tensor] = {}
        for stage in runs.stages:
            totals = runs.gather(stage, self.method.statistic)
            for i in stage:
                found = self.method.unit_scores(self.layers[i], self.pattern, totals[i])
                scores[i] = found.cpu()
        units = self._rank([scores[i] for i in range(len(self.layers))])
        return Budget([self._weights_in(u, i) for i, u in enumerate(units)])

    def _rank(self, scores: list[Tensor]) -> list[Tensor]:
        shapes = [layer.weight.shape for layer in self.layers]
        kept = kept_weights(sum(s.numel() for s in shapes), self.sparsity)
        return rank_globally(scores, [self.pattern.unit_sizes(s) for s in shapes], kept)

    def _weights_in(self, units: Tensor, index: int) -> int:
        sizes = self.pattern.unit_sizes(self.layers[index].weight.shape)
        if isinstance(sizes, int):
            return sizes * int(units.count_nonzero())
        return int(sizes[units].sum())

    def _each_layer(self, act, indices, budget: Budget, totals: Mapping) -> list[Tensor]:
        masks = []
        for i in indices:
            layer, kept = self.layers[i], budget.of(i)
            if kept >= layer.weight.numel():
                mask = torch.ones_like(layer.weight, dtype=torch.bool)
            else:
                by_row = self.method.by_row and not self.ranks_globally
                mask = act(layer, self.pattern, kept, totals.get(i), by_row)
            budget.settle(i, int(mask.count_nonzero()))
            masks.append(mask)
        return masks
