"""What `sparsekern bench` does: prune fresh copies, convert, compare, over a grid of settings."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsekern.measure.compare import Comparison, compare, plain, use_threads
from sparsekern.measure.models import BenchModel, build_model
from sparsekern.measure.report_html import write_atomically, write_sweep_html
from sparsekern.measure.table import MISSING, milliseconds, percent, si, text_table, times


@dataclass(frozen=True)
class BenchSettings:
    """A grid of configurations; see `sparsekern bench --help` for each field.

    Attributes:
        model: name `build_model` knows.
        method: pruning method.
        patterns: patterns, as strings.
        sparsities: shares of zeros; an N:M pattern takes its own instead.
        scope: how sparsity is spread over layers; None for the method's own way.
        batches: samples per forward pass.
        seq: tokens per sample.
        threads: CPU threads, or None for torch's choice.
        budget_s: seconds of timing per configuration.
        energy: "measured", "modelled" or "none".
    """

    model: str
    method: str
    patterns: tuple[str, ...]
    sparsities: tuple[float, ...]
    scope: str | None
    batches: tuple[int, ...]
    seq: int
    threads: int | None
    budget_s: float
    energy: str

    def grid(self) -> list[tuple[int, str, float]]:
        """Every (batch, pattern, sparsity) to run, without repeats."""
        from sparsekern.patterns import NM, parse

        points = []
        for batch, pattern in itertools.product(self.batches, self.patterns):
            parsed = parse(pattern)
            own = (parsed.sparsity,) if isinstance(parsed, NM) else self.sparsities
            points += [(batch, pattern, sparsity) for sparsity in own]
        return list(dict.fromkeys(points))


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        settings: the grid.
        origin: where the weights come from.
        rows: one dict per configuration, with the keys of `write_sweep_html`.
        comparisons: the comparison behind each row.
    """

    settings: BenchSettings
    origin: str
    rows: tuple[dict[str, object], ...]
    comparisons: tuple[Comparison, ...]

    def title(self) -> str:
        """Model, origin of its weights and pruning method."""
        s = self.settings
        scope = f", {s.scope} scope" if s.scope else ""
        return f"{s.model} ({self.origin}), {s.method} pruning{scope}"

    def table(self) -> str:
        """One line per configuration."""
        columns = ["pattern", "sparsity", "batch", "dense", "sparse", "speed-up", "energy"]
        columns += ["weights", "error", "layers"]
        table = text_table(self.title(), columns, [_text_row(row) for row in self.rows])
        first = self.comparisons[0]
        machine, energy = first.hardware, first.dense.energy
        why = f" ({energy.reason})" if energy.reason else ""
        return (
            f"{table}\n  energy: {energy.source}{why}\n"
            "  error: relative to the pruned dense model; layers: sparse / kept dense\n"
            f"  {machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}"
        )

    def to_json(self) -> str:
        """Settings, machine, rows and full comparisons as JSON text."""
        content = {
            "format": "sparsekern bench",
            "version": 1,
            "settings": asdict(self.settings),
            "origin": self.origin,
            "hardware": self.comparisons[0].hardware,
            "rows": self.rows,
            "comparisons": [c.to_dict() for c in self.comparisons],
        }
        return json.dumps(plain(content), indent=2, allow_nan=False)

    def write(self, folder: Path) -> list[Path]:
        """Write the JSON and the HTML report into `folder` and return their paths.

        Raises:
            OSError: if a file cannot be written; older files stay as they were.
            ImportError: if a package the HTML report needs is missing; the JSON is then written.
        """
        stem = "bench-" + "".join(
            c if c.isalnum() or c in "-_." else "-" for c in self.settings.model
        )
        data = write_atomically(folder / f"{stem}.json", self.to_json() + "\n")
        shared = (n for n in self.comparisons[0].notes if not n.startswith("Conversion:"))
        notes = (
            "Each configuration prunes a fresh copy of the dense model and converts it. The "
            "baseline is the same pruned model before conversion, run by dense kernels. Numbers "
            "of samples below are those of the first configuration.",
            *shared,
        )
        page = write_sweep_html(
            folder / f"{stem}.html",
            self.title(),
            self._plotted_rows(),
            notes,
            hardware=self.comparisons[0].hardware,
        )
        return [data, page]

    def _plotted_rows(self) -> list[dict[str, object]]:
        """Rows whose pattern tells batches apart, so that each batch gets a line of its own."""
        if len(self.settings.batches) == 1:
            return list(self.rows)
        return [{**r, "pattern": f"{r['pattern']}, batch {r['batch']}"} for r in self.rows]


def run_sweep(settings: BenchSettings) -> SweepResult:
    """Prune, convert and compare at every point of the grid, with a progress bar on stderr.

    Raises:
        ValueError, ImportError: from building the model, pruning or converting.
    """
    rows, comparisons, origin = [], [], ""
    dense: dict[int, BenchModel] = {}
    for batch, pattern, sparsity in _with_progress(settings.grid()):
        if batch not in dense:
            dense = {batch: build_model(settings.model, batch, settings.seq)}
        origin = dense[batch].origin
        comparison = _run_point(settings, dense[batch], pattern, sparsity)
        rows.append(_row(batch, pattern, sparsity, comparison))
        comparisons.append(comparison)
    return SweepResult(settings, origin, tuple(rows), tuple(comparisons))


def _with_progress(points: list) -> Iterator:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("bench", total=len(points))
        for point in points:
            batch, pattern, sparsity = point
            progress.update(task, description=f"{pattern} {percent(sparsity)}, batch {batch}")
            yield point
            progress.advance(task)


def _run_point(settings, dense: BenchModel, pattern: str, sparsity: float) -> Comparison:
    from sparsekern.convert import convert_to_sparse
    from sparsekern.prune import prune

    inputs = dense.example_inputs
    pruned = copy.deepcopy(dense.model).eval()
    prune(
        pruned,
        method=settings.method,
        sparsity=sparsity,
        pattern=pattern,
        scope=settings.scope,
        data=[inputs],
    )
    with use_threads(settings.threads):  # the choice of kernels depends on it
        # Two live progress bars would fight over the terminal.
        sparse = convert_to_sparse(copy.deepcopy(pruned), inputs, progress=False)
    return compare(
        pruned,
        sparse,
        inputs,
        budget_s=settings.budget_s,
        threads=settings.threads,
        energy=settings.energy,
    )


def _row(batch: int, pattern: str, sparsity: float, c: Comparison) -> dict[str, object]:
    return {
        "pattern": pattern,
        "sparsity": sparsity,
        "batch": batch,
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
        "output_error": c.max_rel_error,
    }


def _text_row(row) -> tuple[str, ...]:
    energy = MISSING
    if row["dense_joules"] and row["sparse_joules"]:
        energy = times(row["dense_joules"] / row["sparse_joules"])
    layers = MISSING
    if row["layers_sparse"] is not None:
        layers = f"{row['layers_sparse']} / {row['layers_dense']}"
    return (
        row["pattern"],
        percent(row["sparsity"]),
        str(row["batch"]),
        milliseconds(row["dense_ms"]),
        milliseconds(row["sparse_ms"]),
        times(row["speedup"]),
        energy,
        f"{si(row['dense_bytes'], 'B')} → {si(row['sparse_bytes'], 'B')}",
        f"{row['output_error']:.1e}",
        layers,
    )
