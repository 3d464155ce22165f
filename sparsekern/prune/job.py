"""One update of the masks: method, pattern, scope and sparsity at work on the layers of a model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..patterns import NM, Pattern, parse
from ..progress import track
from ..ranking import check_sparsity, kept_weights, weights_in
from .allocation import Budget, allocate, check_scope, rank_globally
from .calibration import Calibration, evaluating
from .data import read_batches
from .methods import make_method
from .methods.base import Method, zero_out
from .methods.magnitude import Magnitude
from .targets import Layer, find_layers, restored_on_error, unwrapped
from .task import Task

DEFAULT_SPARSITY = 0.9


def prepare(
    model,
    method,
    sparsity,
    pattern,
    scope,
    data,
    loss_fn,
    targets,
    ignore,
    options,
    training=False,
    distributed=None,
) -> tuple["Job", dict[str, str]]:
    """Check everything a pruning needs, before anything changes.

    Arguments are those of `prune`; `training` allows methods that work during training only. Of a
    model in `DistributedDataParallel` the layers have the names that they have in the model inside.

    Returns:
        The job, and the layers left out with the reason.
    """
    if distributed is None:
        distributed = isinstance(model, DistributedDataParallel)
    model = unwrapped(model)
    chosen, pattern = make_method(method, options), parse(pattern)
    _check_sparsity(sparsity, pattern)
    _check_method(chosen, method, pattern, loss_fn, training)
    scope = chosen.scope if scope is None else scope
    layers, skipped = find_layers(model, targets, ignore, pattern)
    check_scope(scope, layers, pattern)
    if chosen.per_layer and scope == "global":
        raise ValueError(
            f"prune: expected a scope that gives each layer a budget (uniform, erk, lamp, std or "
            f"a dict), which method {method!r} needs, got 'global'"
        )
    if sparsity is None and not isinstance(scope, Mapping):
        sparsity = pattern.sparsity if isinstance(pattern, NM) else DEFAULT_SPARSITY
    task = _make_task(model, method, chosen.needs, data, loss_fn)
    task = replace(task, distributed=bool(distributed))
    return Job(chosen, pattern, scope, sparsity, layers, task), skipped


def _check_method(chosen: Method, method: str, pattern: Pattern, loss_fn, training: bool) -> None:
    if not chosen.one_shot and not training:
        raise ValueError(
            f"prune: expected a method that needs no training, got {method!r}; use "
            f"Pruner(model, optimizer, method={method!r})"
        )
    if reason := chosen.misfit(pattern):
        raise ValueError(f"prune: {reason}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"prune: expected loss_fn to be callable, got {type(loss_fn).__name__}")


def _check_sparsity(sparsity: float | None, pattern: Pattern) -> None:
    if sparsity is not None:
        check_sparsity("prune", sparsity)
        if isinstance(pattern, NM):
            pattern.check_agrees("prune", sparsity)


def _make_task(model, method: str, needs: str, data, loss_fn) -> Task:
    if not needs:
        return Task(model)
    for name, value in (("data", data), ("loss_fn", loss_fn)):
        if value is None and (name == "data" or needs == "loss"):
            raise ValueError(f"prune: expected {name}, which method {method!r} needs, got None")
    return Task(model, read_batches(data), loss_fn)


@dataclass(frozen=True)
class Job:
    """One update of the masks.

    Attributes:
        method: Scores, and what becomes of the weights.
        pattern: Which weights go together.
        scope: How the budget is spread over layers.
        sparsity: Share of zeros; with a dict for scope that of layers it does not name, or None.
        layers: The layers, each with what is alive in it.
        task: Model, data and loss.
        totals: What the method observed while training, one tensor per layer, instead of measuring.
        progress: Whether to show a progress bar over stages or rounds, as for `progress.track`.
        collapsed: Layers whose collapse was warned of.
    """

    method: Method
    pattern: Pattern
    scope: str | Mapping[str, float]
    sparsity: float | None
    layers: list[Layer]
    task: Task
    totals: tuple[Tensor | None, ...] | None = None
    progress: bool | None = False
    collapsed: set[str] = field(default_factory=set, compare=False)

    def run(self) -> list[Tensor]:
        """Choose the masks and set the dropped weights to zero; puts them back on failure."""
        self.task.notes.clear()
        if self.method.statistic is not None:
            return self._run_in_stages()
        rounds = 1 if isinstance(self.pattern, NM) else self.method.rounds
        job, masks = self, []
        with restored_on_error(self.layers if rounds > 1 else ()):
            for number in self._track(range(1, rounds + 1)):
                masks = job._softened(number / rounds)._run_at_once()
                job = replace(
                    job, layers=[replace(la, alive=m) for la, m in zip(job.layers, masks)]
                )
        return masks

    def _track(self, items: Sequence) -> Iterable:
        return track(items, "pruning", self.progress)

    @property
    def _ranks_globally(self) -> bool:
        return self.scope == "global" and not isinstance(self.pattern, NM)

    def _softened(self, share: float) -> "Job":
        """Give the job of an early round: densities to the power of `share`."""
        if share == 1:
            return self

        def soften(sparsity: float | None) -> float | None:
            return None if sparsity is None else 1 - (1 - sparsity) ** share

        scope = self.scope
        if isinstance(scope, Mapping):
            scope = {name: soften(value) for name, value in scope.items()}
        return replace(self, scope=scope, sparsity=soften(self.sparsity))

    def _run_at_once(self) -> list[Tensor]:
        """Choose all masks from the weights as they are, then apply them."""
        totals = self.totals
        if totals is None:
            totals = self.method.measure(self.task, self.layers, self.pattern)
            self.task.average([t for t in totals if t is not None])
        if self._ranks_globally:
            masks = self._choose_globally(totals)
        else:
            indices, totals = range(len(self.layers)), dict(enumerate(totals))
            masks = self._each_layer(self.method.mask, indices, self._budget(), totals)
        self.task.agree(masks)
        for layer, mask in zip(self.layers, masks):
            zero_out(layer, mask)
            self.method.settle(self.task.model, layer, mask)
        return masks

    def _choose_globally(self, totals) -> list[Tensor]:
        scores = [
            self.method.unit_ranks(layer, self.pattern, total).cpu()
            for layer, total in zip(self.layers, totals)
        ]
        masks = []
        for layer, units in zip(self.layers, self._rank(scores, self.layers)):
            weight = layer.weight
            mask = self.pattern.expand(units, weight.shape).to(weight.device)
            masks.append(_own(mask if layer.alive is None else mask & layer.alive))
        return masks

    def _run_in_stages(self) -> list[Tensor]:
        """Prune stage by stage on calibration data; global budgets come from a first dense run."""
        masks: dict[int, Tensor] = {}
        with evaluating(self.task.model), restored_on_error(self.layers):
            runs = Calibration(
                self.task.model, self.layers, self.task.batches, self.method.sequential
            )
            budget = self._global_budget(runs) if self._ranks_globally else self._budget()
            for stage in self._track(runs.stages):
                totals = self._gather(runs, stage)
                found = self._each_layer(self.method.prune_layer, stage, budget, totals)
                self.task.agree([*found, *(self.layers[i].weight for i in stage)])
                masks.update(zip(stage, found))
            self._refuse_no_data()
        return [masks[i] for i in range(len(self.layers))]

    def _gather(self, runs: Calibration, stage) -> dict[int, Tensor]:
        """Statistics of the layers of a stage; a layer that no batch reaches gets a note."""
        totals = runs.gather(stage, self.method.statistic, partial=True)
        hits = torch.tensor([float(i in totals) for i in stage])
        hits = hits.to(self.layers[stage[0]].weight.device)
        self.task.average([hits])
        seen = [i for i, hit in zip(stage, hits.tolist()) if hit]
        for i in seen:
            totals.setdefault(i, self.method.statistic(self.layers[i], self._no_rows(i)))
        self.task.average([totals[i] for i in sorted(totals)])
        for i in set(stage) - set(seen):
            why = runs.why_unreached(i)
            self.task.notes[self.layers[i].name] = f"pruned by magnitude, as {why}"
        return totals

    def _no_rows(self, index: int) -> Tensor:
        weight = self.layers[index].weight
        return weight.new_empty(self.layers[index].groups, 0, weight[0].numel())

    def _refuse_no_data(self) -> None:
        if all(layer.name in self.task.notes for layer in self.layers):
            name = self.layers[0].name
            why = self.task.notes[name].partition(", as ")[2]
            raise ValueError(
                f"prune: expected the calibration data to reach a layer, got no call of {name!r} "
                f"({why}) or any other"
            )

    def _budget(self) -> Budget:
        return allocate(self.scope, self.layers, self.pattern, self.sparsity)

    def _global_budget(self, runs: Calibration) -> Budget:
        scores: dict[int, Tensor] = {}
        for stage in self._track(runs.stages):
            totals = self._gather(runs, stage)
            for i in totals:
                scores[i] = self.method.unit_ranks(self.layers[i], self.pattern, totals[i]).cpu()
        self._refuse_no_data()
        ranked = sorted(scores)
        units = self._rank([scores[i] for i in ranked], [self.layers[i] for i in ranked])
        sizes = [self.pattern.unit_sizes(self.layers[i].weight.shape) for i in ranked]
        # A layer without data cannot be compared with the others: it gets the sparsity of all.
        kept = [kept_weights(layer.weight.numel(), self.sparsity) for layer in self.layers]
        for i, chosen, size in zip(ranked, units, sizes):
            kept[i] = weights_in(chosen, size)
        return Budget(kept)

    def _rank(self, scores: list[Tensor], layers: Sequence[Layer]) -> list[Tensor]:
        shapes = [layer.weight.shape for layer in layers]
        kept = kept_weights(sum(s.numel() for s in shapes), self.sparsity)
        return rank_globally(scores, [self.pattern.unit_sizes(s) for s in shapes], kept)

    def _act(self, act, i: int, kept: float, total: Tensor | None, by_row: bool) -> Tensor:
        if total is None and self.method.statistic is not None:
            act, by_row = Magnitude().prune_layer, False
        return act(self.layers[i], self.pattern, kept, total, by_row)

    def _each_layer(self, act, indices, budget: Budget, totals: Mapping) -> list[Tensor]:
        masks = []
        for i in indices:
            layer, kept = self.layers[i], budget.of(i)
            if kept >= layer.weight.numel():
                whole = torch.ones_like(layer.weight, dtype=torch.bool)
                mask = whole if layer.alive is None else layer.alive.clone()
            else:
                by_row = self.method.by_row and not self._ranks_globally
                mask = self._act(act, i, kept, totals.get(i), by_row)
            budget.settle(i, int(mask.count_nonzero()))
            masks.append(_own(mask))
        return masks


def _own(mask: Tensor) -> Tensor:
    """The mask in memory of its own: one of whole filters may be a row shown many times."""
    return mask.contiguous()
