"""Sensitivity analysis: how accuracy falls when one layer alone is pruned."""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..patterns import NM, Pattern, parse
from ..progress import track
from ..ranking import check_sparsity
from .api import prune
from .data import read_batches
from .left import all_reasons, find_left
from .plots import new_figure
from .targets import find_layers

GRID = (0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Sensitivity:
    """Scores of a model with one layer pruned at a time.

    Attributes:
        baseline: Score of the dense model, larger = better.
        sparsities: The sparsities tried, ascending.
        scores: By layer name, one score per sparsity.
        skipped: Why other weights were left, as in the report of `prune`.
    """

    baseline: float
    sparsities: tuple[float, ...]
    scores: Mapping[str, tuple[float, ...]]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def scope(self, tolerance: float) -> dict[str, float]:
        """Sparsity of each layer for `prune(scope=)`: the largest that loses at most `tolerance`.

        Once a sparsity loses more, larger ones do not count; a layer that takes none stays dense.
        Layers act together, so the loss of all is larger than that of each.
        """
        chosen = {}
        for name, scores in self.scores.items():
            chosen[name] = 0.0
            for sparsity, score in zip(self.sparsities, scores):
                if not self.baseline - score <= tolerance:
                    break
                chosen[name] = sparsity
        return chosen

    def to_dict(self) -> dict:
        """Give the result as plain dicts, lists and numbers (ready for JSON)."""
        scores = {name: list(values) for name, values in self.scores.items()}
        head = {"baseline": self.baseline, "sparsities": list(self.sparsities)}
        return {**head, "scores": scores, "skipped": dict(self.skipped)}

    def table(self) -> str:
        """Draw the scores as a text table."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"dense: {self.baseline:.4g}", title_justify="left")
        table.add_column("layer")
        for sparsity in self.sparsities:
            table.add_column(f"{sparsity:.4g}", justify="right")
        for name, scores in self.scores.items():
            table.add_row(name or "(model)", *(f"{score:.4g}" for score in scores))
        text = io.StringIO()
        console = Console(file=text, width=120, color_system=None)
        console.print(table)
        for name, reason in self.skipped.items():
            line = f"{name or '(model)'} was left: {reason}"
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        return text.getvalue()

    def __str__(self) -> str:
        """Give the table."""
        return self.table()

    def plot(self, path: str | Path) -> None:
        """Draw score against sparsity, a line per layer, into an image file (needs matplotlib)."""
        figure, axes = new_figure(xlabel="sparsity of the layer", ylabel="score")
        axes.axhline(self.baseline, color="grey", linestyle="--", label="dense")
        for name, scores in self.scores.items():
            axes.plot(self.sparsities, scores, marker="o", label=name or "(model)")
        axes.legend(fontsize="small")
        figure.savefig(path)


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    sparsities: Sequence[float] | None = None,
    method: str = "magnitude",
    pattern: str | Pattern = "unstructured",
    data: Iterable | None = None,
    loss_fn=None,
    targets: type | Sequence[type] = (nn.Linear, nn.Conv2d),
    ignore: str | type | Iterable[str | type] = (),
    progress: bool | None = None,
    **method_options,
) -> Sensitivity:
    """Prune each layer alone at several sparsities and evaluate, without retraining.

    Han et al. 2015, arXiv:1506.02626, section 3; Li et al. 2017, arXiv:1608.08710, section 3.2.
    Parameters and buffers are put back after every probe. Use data held out of the *training* set
    to evaluate, or the test set takes part in choosing the network.

    Args:
        model: Any module.
        evaluate: From the model to its score, a finite number, larger = better.
        sparsities: Default 0.5 to 0.95, or what an N:M pattern fixes.
        method: As for `prune`, like all arguments that follow.
        pattern: As for `prune`.
        data: As for `prune`.
        loss_fn: As for `prune`.
        targets: As for `prune`.
        ignore: As for `prune`.
        progress: Show a progress bar over the layers, as for `prune`.
        **method_options: As for `prune`.

    Raises:
        ValueError: As for `prune`; no sparsity; a score that is not finite.
        TypeError: As for `prune`; a score that is no number.
    """
    parsed = parse(pattern)
    if sparsities is None:
        sparsities = (parsed.sparsity,) if isinstance(parsed, NM) else GRID
    if not sparsities:
        raise ValueError("sensitivity: expected at least one sparsity, got none")
    for value in sparsities:
        check_sparsity("sensitivity", value)
    grid = tuple(sorted(sparsities))
    layers, skipped = find_layers(model, targets, ignore, parsed)
    batches = None if data is None else _as_items(data)
    scores: dict[str, tuple[float, ...]] = {}
    baseline = _score(model, evaluate)
    for layer in track(layers, "sensitivity", progress):
        found = []
        for value in grid:
            with _restored(model):
                scope = {layer.name: value}
                options = (batches, loss_fn, targets, ignore, False)
                prune(model, method, None, parsed, scope, *options, **method_options)
                found.append(_score(model, evaluate))
        scores[layer.name] = tuple(found)
    left = find_left(model, layers, skipped)
    return Sensitivity(baseline, grid, scores, all_reasons(skipped, left))


def _as_items(data) -> list:
    # Read once: every probe needs the data, and an iterator has it only once.
    return [(batch.kwargs or batch.args, batch.target) for batch in read_batches(data)]


def _score(model: nn.Module, evaluate) -> float:
    score = evaluate(model)
    try:
        score = float(score)
    except (TypeError, ValueError):
        got = type(score).__name__
        raise TypeError(f"sensitivity: expected evaluate to give a number, got {got}") from None
    if not math.isfinite(score):
        raise ValueError(f"sensitivity: expected evaluate to give a finite number, got {score}")
    return score


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, before):
                tensor.copy_(copy)
