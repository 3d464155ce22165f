"""A line of a figure: a pruning method in one use of it, and how one network goes through it."""

import copy
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from frame import Bench, Experiment, Training, accuracy, conversion_error
from networks import lenet_300_100, small_hidden
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.prune.methods import METHODS

SLIMMING = partial(sk.slimming_penalty, strength=1e-3)
UPDATES = 25  # of masks, in a training that changes them
ROUNDS = 4  # of pruning and retraining


@dataclass(frozen=True)
class Line:
    """What is pruned, by what, and when. A line without a method is a dense network.

    Attributes:
        name: In tables and figures.
        method: Of `sk.Pruner`; empty for a dense network.
        when: `"start"` prunes the untrained network, or while it trains; `"after"` prunes the
            trained one and trains what is left for the epochs of `--tune`.
        network: Name in NETWORKS.
        pattern: Of `sk.Pruner`.
        scope: Of `sk.Pruner`, or a function `(model, sparsity, batches) -> scope`.
        schedule: None for the method's own, `"cubic"`, `"late"` (cubic, after some steps),
            `"rounds"` (of pruning and training), `"updates"` (constant sparsity, changing masks) or
            `"steps"` (changing in every step).
        options: Of the method.
        ignore: Layers that stay dense.
        sparsities: Instead of those asked for: what a pattern fixes.
        penalty: Added to the loss of the dense training.
        permuted: Channels are reordered for the pattern first (`sk.permute_channels`).
        refitted: What is left is refitted to the dense network (`sk.reconstruct`).
        small: A dense network with as many weights as the sparsity leaves.
        images: Training images, if fewer than asked for.
    """

    name: str
    method: str = ""
    when: str = "start"
    network: str = "LeNet-300-100"
    pattern: str = "unstructured"
    scope: str | Callable | None = None
    schedule: str | None = None
    options: Mapping = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    sparsities: tuple[float, ...] = ()
    penalty: Callable | None = None
    permuted: bool = False
    refitted: bool = False
    small: bool = False
    images: int | None = None

    def keys(self, options: Namespace) -> list[dict]:
        """The keys of its records: every sparsity and seed."""
        dense = not self.method and not self.small
        points = (0.0,) if dense else self.sparsities or tuple(options.sparsities)
        seeds = options.seeds
        return [{"line": self.name, "sparsity": s, "seed": seed} for seed in seeds for s in points]

    def run(self, bench: Bench, sparsity: float, seed: int) -> dict:
        """Prune and train one network; accuracies in percent of the test images."""
        model, epochs = self._model(bench, sparsity, seed)
        data = bench.data.first(self.images)
        training = Training(model, data, bench.options, epochs, seed)
        pruner = self._pruned(training, sparsity, seed, bench) if self.method else None
        one_shot = self.when == "after" and self.schedule is None
        pruned = accuracy(model, data.test) if one_shot else None
        for _ in training.epochs(pruner, self._grown()):
            pass
        found = {"accuracy": accuracy(model, data.test), "pruned": pruned}
        if pruner is None:
            return {**found, "weights": sum(p.numel() for p in model.parameters())}
        report = pruner.finalize()
        return {
            **found,
            "weights": sum(int(p.count_nonzero()) for p in model.parameters()),
            "sparsity": report.sparsity,
            "layers": {layer.name: layer.sparsity for layer in report.layers},
            "converted_error": conversion_error(model, data.test),
        }

    def _model(self, bench: Bench, sparsity: float, seed: int) -> tuple[nn.Module, int]:
        """The network it begins with, and the epochs that are left for it."""
        both = bench.options.epochs + bench.options.tune
        if self.small:
            torch.manual_seed(seed)
            return lenet_300_100(small_hidden(sparsity)), both
        if self.when == "after":
            return bench.dense(self.network, seed, self.penalty), bench.options.tune
        return bench.fresh(self.network, seed), both

    def _grown(self) -> Callable | None:
        """The penalty of a network that is trained from its start."""
        return self.penalty if self.when == "start" else None

    def _pruned(self, training: Training, sparsity: float, seed: int, bench: Bench) -> sk.Pruner:
        """Prune the network, or begin to, and do what goes before and after."""
        model = training.model
        dense = copy.deepcopy(model) if self.refitted else None
        if self.permuted:
            sk.permute_channels(model, self.pattern)
        pruner = self._pruner(training, sparsity, seed, bench)
        if dense is not None:
            sk.reconstruct(model, dense, bench.scoring(seed), progress=False)
        return pruner

    def _pruner(self, training: Training, sparsity: float, seed: int, bench: Bench) -> sk.Pruner:
        batches, model = bench.scoring(seed), training.model
        named = {f.name for f in fields(METHODS[self.method]) if f.init}
        seeds = {"seed": seed} if "seed" in named else {}
        is_rule = callable(self.scope)
        return sk.Pruner(
            model,
            training.optimizer,
            self.method,
            sparsity,
            self.pattern,
            self.scope(model, sparsity, batches) if is_rule else self.scope,
            schedule=self._schedule(sparsity, training.steps),
            data=batches,
            loss_fn=F.cross_entropy,
            ignore=self.ignore,
            **seeds,
            **self.options,
        )

    def _schedule(self, sparsity: float, steps: int) -> sk.schedules.Schedule | None:
        """Masks change for the last time after three quarters of the steps, as in RigL."""
        end, every = max(3 * steps // 4, 2), max(steps // UPDATES, 1)
        if self.schedule in ("updates", "steps"):
            return sk.schedules.Constant(sparsity, every if self.schedule == "updates" else 1, end)
        if self.schedule is None:
            return None
        if self.schedule == "rounds":
            return sk.schedules.Iterative(sparsity, ROUNDS, max(end // ROUNDS, 1), start=0)
        start = 0 if self.schedule == "cubic" else max(end // 4, 1)
        return sk.schedules.Cubic(0.0, sparsity, start, end, every)


def experiment(lines: Sequence[Line], **defaults) -> Experiment:
    """An experiment of lines, all of which share one file of results."""
    named = {line.name: line for line in lines}

    def keys(options: Namespace) -> list[dict]:
        # Seed by seed: what is there early shows all lines.
        found = [key for line in lines for key in line.keys(options)]
        return sorted(found, key=lambda key: options.seeds.index(key["seed"]))

    def run(bench: Bench, key: dict) -> dict:
        return named[key["line"]].run(bench, key["sparsity"], key["seed"])

    return Experiment("lines", keys, run, defaults)


def owl_shares(model: nn.Module, sparsity: float, batches: list) -> dict[str, float]:
    """A scope: more for layers with outliers, a layer being a block; the spread fits the budget."""
    return sk.owl(model, batches, sparsity, spread=min(0.08, (1 - sparsity) / 2))


def shares_of(method: str, **options) -> Callable:
    """A scope: every layer as sparse as another method would make it."""

    def scope(model: nn.Module, sparsity: float, batches: list) -> dict[str, float]:
        report = sk.prune(
            copy.deepcopy(model),
            method,
            sparsity,
            data=batches,
            loss_fn=F.cross_entropy,
            **options,
        )
        return {layer.name: layer.sparsity for layer in report.layers}

    return scope
