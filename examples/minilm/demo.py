"""Prune all-MiniLM-L6-v2, convert it, and compare it with its dense self.

    python examples/minilm/demo.py
    python examples/minilm/demo.py --patterns unstructured --sparsities 0.7 0.9 --batch 1

For every pattern and sparsity: prune and calibrate a copy of the model (see calibrate.py), evaluate
it on human ratings (see evaluate.py), convert it to sparse layers, evaluate again, and measure it
against the dense model. Prints one table, writes an HTML and a JSON report, and saves a model.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import calibrate
import evaluate
import torch
from evaluate import Accuracy
from torch import nn

import sparsekern as sk
from sparsekern.measure import Comparison, write_atomically, write_sweep_html
from sparsekern.measure.compare import plain
from sparsekern.measure.table import MISSING, milliseconds, percent, si, text_table, times

TITLE = "all-MiniLM-L6-v2: dense against pruned"
KEPT = 0.95  # a model to recommend keeps this share of the dense accuracy


@dataclass(frozen=True)
class Result:
    """One configuration: what was asked, how good it is, what it costs."""

    pattern: str
    sparsity: float
    dense: Accuracy
    pruned: Accuracy
    converted: Accuracy
    calibration_s: float
    comparison: Comparison

    def row(self) -> dict[str, object]:
        """The keys of `write_sweep_html`, and both tasks as columns of their own."""
        c = self.comparison
        return {
            "pattern": self.pattern,
            "sparsity": self.sparsity,
            "WordSim-353 dense / pruned / converted": self._task("wordsim"),
            "Lee dense / pruned / converted": self._task("lee"),
            "accuracy": self.converted.mean,
            "dense_accuracy": self.dense.mean,
            "dense_ms": c.dense.latency.median_ms,
            "sparse_ms": c.sparse.latency.median_ms,
            "speedup": c.speedup.median,
            "dense_joules": c.dense.energy.joules,
            "sparse_joules": c.sparse.energy.joules,
            "energy_source": c.dense.energy.source,
            "dense_bytes": c.dense.weight_bytes,
            "sparse_bytes": c.sparse.weight_bytes,
            "layers_sparse": c.layers_sparse,
            "layers_dense": c.layers_dense,
        }

    def _task(self, name: str) -> str:
        sides = (self.dense, self.pruned, self.converted)
        return " / ".join(f"{getattr(side, name):.3f}" for side in sides)

    def text(self) -> tuple[str, ...]:
        """The cells of the printed table."""
        row, c = self.row(), self.comparison
        joules = row["dense_joules"], row["sparse_joules"]
        energy = f"{si(joules[0], 'J')} → {si(joules[1], 'J')}" if all(joules) else MISSING
        return (
            self.pattern,
            percent(self.sparsity),
            self._task("wordsim"),
            self._task("lee"),
            f"{milliseconds(row['dense_ms'])} → {milliseconds(row['sparse_ms'])}",
            times(row["speedup"]),
            energy,
            f"{si(c.dense.weight_bytes, 'B')} → {si(c.sparse.weight_bytes, 'B')}",
            f"{c.layers_sparse} / {c.layers_dense}",
        )


class Demo:
    """The dense model, the data and the settings, shared by all configurations."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.dense, self.tokenizer = evaluate.load_model()
        self.texts, self.recipe = evaluate.load_texts(), calibrate.Recipe()
        if options.quick:
            self.texts = replace(self.texts, pairs=self.texts.pairs[:40])
            self.recipe = calibrate.Recipe(sentences=16, words=64, documents=2, steps=2)
        background = self.texts.background
        self.batches = calibrate.calibration_batches(self.tokenizer, background, self.recipe)
        self.inputs = self._inputs()
        self.dense_accuracy = self.accuracy(self.dense)

    def _inputs(self) -> dict:
        """One batch of real documents, padded or cut to the asked number of tokens."""
        documents = self.texts.documents
        chosen = [documents[i % len(documents)] for i in range(self.options.batch)]
        options = {"padding": "max_length", "truncation": True, "max_length": self.options.seq}
        tokens = self.tokenizer(chosen, **options, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def accuracy(self, model: nn.Module) -> Accuracy:
        return evaluate.accuracy(model, self.tokenizer, self.texts)

    def run(self, pattern: str, sparsity: float) -> tuple[Result, nn.Module]:
        """Prune, calibrate, evaluate, convert, evaluate, compare."""
        start = time.perf_counter()
        model = calibrate.calibrate(self.dense, self.batches, pattern, sparsity, self.recipe)
        seconds = time.perf_counter() - start
        pruned = self.accuracy(model)
        model = sk.convert_to_sparse(model, self.inputs, progress=False)
        budget = 0.3 if self.options.quick else 2.0
        comparison = sk.compare(self.dense, model, self.inputs, budget_s=budget, energy="modelled")
        accuracies = self.dense_accuracy, pruned, self.accuracy(model)
        return Result(pattern, sparsity, *accuracies, seconds, comparison), model

    def notes(self, results: list[Result]) -> list[str]:
        """What was done, for a reader who has only the report."""
        recipe, tokens = self.recipe, sum(int(b["attention_mask"].sum()) for b in self.batches)
        seconds = sum(result.calibration_s for result in results) / len(results)
        shared = [n for n in results[0].comparison.notes if not n.startswith("Conversion:")]
        quick = ["Quick run: few texts and short timing; do not quote these figures."]
        return [
            *(quick if self.options.quick else []),
            "Accuracy: correlation of cosine similarities with human ratings. WordSim-353: "
            f"Spearman over {len(self.texts.pairs)} word pairs. Lee: Pearson over all pairs of "
            f"{len(self.texts.documents)} documents. Higher is better; the plot shows their mean.",
            f"Calibration: {recipe.sentences} sentences, {recipe.words} single words and "
            f"{recipe.documents} documents ({tokens} tokens) of Lee's background news, which share "
            "no document with the rated texts and carry no ratings. Layer by layer, in "
            f"{recipe.steps} steps of rising sparsity (one step for N:M), wanda chooses what goes, "
            "and least squares refits what stays to the dense model's output. No training; "
            f"{seconds:.0f} s per configuration here.",
            "The 36 linear layers of the encoder are pruned, each to the same sparsity; embeddings "
            "stay dense and are more than half of all weights. Dense is the unpruned model. "
            f"Input: {self.options.batch} documents of {self.options.seq} tokens.",
            *shared,
        ]


def grid(patterns: list[str], sparsities: list[float]) -> list[tuple[str, float]]:
    """Every (pattern, sparsity); an N:M pattern has one sparsity of its own."""
    points = []
    for pattern in patterns:
        parsed = sk.patterns.parse(pattern)
        own = [parsed.sparsity] if isinstance(parsed, sk.patterns.NM) else sparsities
        points += [(str(parsed), sparsity) for sparsity in own]
    return list(dict.fromkeys(points))


def recommended(results: list[Result]) -> int:
    """Index of the fastest model that keeps 95 % of the dense accuracy; else of the best one."""
    good = [i for i, r in enumerate(results) if r.converted.mean >= KEPT * r.dense.mean]
    if good:
        return max(good, key=lambda i: results[i].comparison.speedup.median)
    return max(range(len(results)), key=lambda i: results[i].converted.mean)


def table(results: list[Result]) -> str:
    """The table of all configurations, with a key."""
    columns = ["pattern", "sparsity", "WordSim-353", "Lee", "latency", "speed-up", "energy"]
    text = text_table(TITLE, [*columns, "weights", "layers"], [r.text() for r in results])
    first = results[0].comparison
    energy = first.dense.energy
    reason = f" ({energy.reason})" if energy.reason else ""
    machine = first.hardware
    return (
        f"{text}\n  WordSim-353, Lee: correlation with human ratings, dense / pruned / converted\n"
        f"  energy per batch: {energy.source}{reason}\n"
        "  weights: of the whole model, with indices; layers: sparse / kept dense\n"
        f"  {machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}"
    )


def write_reports(folder: Path, results: list[Result], notes: list[str], options) -> list[Path]:
    """Write minilm.json and minilm.html and return their paths."""
    hardware = results[0].comparison.hardware
    content = {
        "format": "sparsekern demo",
        "version": 1,
        "settings": vars(options),
        "hardware": hardware,
        "notes": notes,
        "rows": [result.row() for result in results],
        "comparisons": [result.comparison.to_dict() for result in results],
    }
    text = json.dumps(plain({**content, "settings": _texts(vars(options))}), indent=2)
    return [
        write_atomically(folder / "minilm.json", text + "\n"),
        write_sweep_html(
            folder / "minilm.html",
            TITLE,
            [result.row() for result in results],
            notes,
            accuracy_label="correlation with ratings",
            hardware=hardware,
        ),
    ]


def _texts(settings: dict) -> dict:
    return {
        key: str(value) if isinstance(value, Path) else value for key, value in settings.items()
    }


def save_and_check(demo: Demo, result: Result, model: nn.Module, folder: Path) -> str:
    """Save the model sparse, and dense for comparison; load it back into a fresh model."""
    sparse, dense = folder / "minilm-sparse.safetensors", folder / "minilm-dense.safetensors"
    sk.save(model, sparse)
    sk.save(demo.dense, dense)
    sizes = [path.stat().st_size for path in (dense, sparse)]
    dense.unlink()  # only its size is of interest
    fresh, _ = evaluate.load_model()
    sk.load(fresh, sparse)
    again = demo.accuracy(fresh)
    return (
        f"saved {result.pattern} at {percent(result.sparsity)} to {sparse}: "
        f"{si(sizes[1], 'B')}, dense {si(sizes[0], 'B')} ({times(sizes[0] / sizes[1])} smaller); "
        f"loaded back into a fresh model: {again}"
    )


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--sparsities", type=float, nargs="+", default=[0.8, 0.9], help="shares of zeros")
    patterns = ["unstructured", "vector:4x1", "block:16x16", "2:4"]
    add("--patterns", nargs="+", default=patterns, help="as sparsekern.patterns.parse takes them")
    add("--batch", type=int, default=8, help="documents per batch")
    add("--seq", type=int, default=128, help="tokens per document")
    add("--threads", type=int, help="CPU threads; default: torch's choice")
    add("--out", type=Path, default=Path("reports"), help="folder of the reports")
    add("--quick", action="store_true", help="few texts, short timing: a trial, not a result")
    options = parser.parse_args(arguments)
    for name, low, high in (("batch", 1, 1024), ("seq", 8, 512), ("threads", 1, 1024)):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            parser.error(f"expected --{name} from {low} to {high}, got {value}")
    for sparsity in options.sparsities:
        if not 0 <= sparsity < 1:
            parser.error(f"expected --sparsities in [0, 1), got {sparsity}")
    try:
        options.grid = grid(options.patterns, options.sparsities)
        evaluate.require_packages()
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    return options


def run_all(demo: Demo, points: list[tuple[str, float]]) -> tuple[list[Result], list[nn.Module]]:
    """Run every configuration, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    results, models = [], []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("demo", total=len(points))
        for pattern, sparsity in points:
            progress.update(task, description=f"{pattern} {percent(sparsity)}")
            result, model = demo.run(pattern, sparsity)
            results.append(result)
            models.append(model)
            progress.advance(task)
    return results, models


def main(arguments: list[str] | None = None) -> None:
    start = time.perf_counter()
    options = parse_options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    demo = Demo(options)
    results, models = run_all(demo, options.grid)
    print(table(results))
    best = recommended(results)
    print(save_and_check(demo, results[best], models[best], options.out))
    for path in write_reports(options.out, results, demo.notes(results), options):
        print(f"wrote {path}")
    print(f"took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ImportError) as error:
        sys.exit(f"demo: {error}")
