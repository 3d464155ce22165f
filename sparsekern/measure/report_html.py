"""HTML reports: one file, no outside resources, light and dark, readable on a phone."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekern.measure import plots
from sparsekern.measure.table import MISSING, comparison_rows, milliseconds, percent, si, times

if TYPE_CHECKING:
    from sparsekern.measure.compare import Comparison

ROW_KEYS = (
    "pattern",
    "sparsity",
    "accuracy",
    "dense_accuracy",
    "dense_ms",
    "sparse_ms",
    "speedup",
    "dense_joules",
    "sparse_joules",
    "energy_source",
    "dense_bytes",
    "sparse_bytes",
    "layers_sparse",
    "layers_dense",
)
REQUIRED_KEYS = ("pattern", "sparsity", "speedup")
# A sweep's headline is the fastest configuration that keeps this share of the dense accuracy.
KEPT_ACCURACY = 0.95


def write_atomically(path: str | Path, text: str) -> Path:
    """Write a UTF-8 text file so that it is either whole or as it was before.

    Returns:
        The path.

    Raises:
        OSError: one clear error naming the file if it cannot be written (missing or read-only
            folder, full disk); an older file stays whole and nothing is left beside it.
    """
    path = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        cause = error.strerror or str(error)
        raise OSError(
            error.errno, f"write_atomically: could not write {path}: {cause}; it is unchanged"
        ) from error
    return path


def _umask() -> int:
    """The process's file mode mask; the system only tells it when it is set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _require_packages(op: str) -> None:
    missing = [p for p in ("matplotlib", "jinja2") if importlib.util.find_spec(p) is None]
    if missing:
        raise ImportError(
            f"{op}: needs the package {' and '.join(missing)}; pip install {' '.join(missing)}"
        )


def write_comparison_html(path: str | Path, comparison: Comparison) -> Path:
    """Write the report of one comparison; see `Comparison.to_html`."""
    _require_packages("to_html")
    c = comparison
    figures = [
        ("Time of one pass", plots.latency_svg(*map(_time_points, (c.dense, c.sparse)))),
        ("What remains of the dense cost", plots.bars_svg(_shares(c))),
    ]
    if any(e["dense_ms"] and e["sparse_ms"] for e in c.layers):
        figures.append(("Speed-up per layer", plots.layers_svg(c.layers)))
    tables = [_table("Dense against sparse", ["", "dense", "sparse", "gain"], comparison_rows(c))]
    if c.layers:
        tables.append(_layer_table(c.layers))
    warnings = []
    if c.reverted:
        warnings.append("The converted model lost against the dense one and was taken back.")
    page = _render(
        title="Dense against sparse",
        headlines=_headlines(c),
        warnings=warnings,
        figures=figures,
        tables=tables,
        notes=c.notes,
        hardware=c.hardware,
    )
    return write_atomically(path, page)


def _time_points(side) -> tuple[float, float, float]:
    return side.latency.p10_ms, side.latency.median_ms, side.latency.p90_ms


def _shares(c: Comparison) -> dict[str, float]:
    """Sparse / dense of every cost both sides have."""
    costs = {
        "time": (c.dense.latency.median_ms, c.sparse.latency.median_ms),
        "weights": (c.dense.weight_bytes, c.sparse.weight_bytes),
        "peak memory": (c.dense.peak_bytes, c.sparse.peak_bytes),
        f"energy ({c.dense.energy.source})": (c.dense.energy.joules, c.sparse.energy.joules),
    }
    return {name: sparse / dense for name, (dense, sparse) in costs.items() if dense and sparse}


def _headlines(c: Comparison) -> list[dict[str, object]]:
    dense, sparse = c.dense, c.sparse
    speed = f"{milliseconds(dense.latency.median_ms)} → {milliseconds(sparse.latency.median_ms)}"
    size = f"{si(dense.weight_bytes, 'B')} → {si(sparse.weight_bytes, 'B')}"
    headlines = [
        _gain(c.speedup.median, "faster", "slower", speed),
        _gain(c.size_ratio, "smaller weights", "larger weights", size),
    ]
    if c.energy_ratio is None:
        headlines.append(_headline(MISSING, "energy", dense.energy.source))
    else:
        joules = f"{si(dense.energy.joules, 'J')} → {si(sparse.energy.joules, 'J')}"
        detail = f"{dense.energy.source}: {joules}"
        headlines.append(_gain(c.energy_ratio, "less energy", "more energy", detail))
    error = "relative to the largest dense output"
    headlines.append(_headline(f"{c.max_rel_error:.1e}", "largest output error", error))
    return headlines


def _headline(value: str, label: str, detail: str, worse: bool = False) -> dict[str, object]:
    return {"value": value, "label": label, "detail": detail, "worse": worse}


def _gain(ratio: float, better: str, worse: str, detail: str) -> dict[str, object]:
    """A headline that says "1.25x slower" rather than hiding a loss in "0.80x"."""
    if ratio >= 1:
        return _headline(times(ratio), better, detail)
    return _headline(times(1 / ratio), worse, detail, worse=True)


def _layer_table(layers: Sequence[Mapping[str, object]]) -> dict[str, object]:
    columns = ["layer", "pattern", "sparsity", "format", "dense", "sparse", "why"]
    rows = [
        (
            str(e["name"]),
            str(e["pattern"]),
            percent(e["sparsity"]),
            str(e["format"]),
            milliseconds(e["dense_ms"]),
            milliseconds(e["sparse_ms"]),
            str(e["reason"] or ""),
        )
        for e in layers
    ]
    return _table("Layers", columns, rows)


def write_sweep_html(
    path: str | Path,
    title: str,
    rows: Sequence[Mapping[str, object]],
    notes: Sequence[str] = (),
    *,
    accuracy_label: str = "accuracy",
    hardware: Mapping[str, object] | None = None,
) -> Path:
    """Write one report of several comparisons, over sparsities and patterns.

    Args:
        path: the file to write.
        title: heading of the page.
        rows: one mapping per configuration with `pattern` (str), `sparsity` (fraction) and
            `speedup`; and, where known, `accuracy` and `dense_accuracy`, `dense_ms` and
            `sparse_ms`, `dense_joules`, `sparse_joules` and `energy_source`, `dense_bytes` and
            `sparse_bytes`, `layers_sparse` and `layers_dense`. Any further key becomes a column
            of its own, headed by its name.
        notes: how the figures came about, one paragraph each.
        accuracy_label: what `accuracy` is, such as "Spearman correlation"; higher is better.
        hardware: the machine, as `hardware()` describes it.

    Returns:
        The path.

    Raises:
        ValueError: if there are no rows or a row lacks a required key.
        OSError: if the file cannot be written; an older file stays as it was.
        ImportError: if matplotlib or jinja2 is missing.
    """
    _check_rows(rows)
    _require_packages("write_sweep_html")
    page = _render(
        title=title,
        headlines=_sweep_headlines(rows, accuracy_label),
        warnings=[],
        figures=_sweep_figures(rows, accuracy_label),
        tables=[_sweep_table(rows, accuracy_label)],
        notes=notes,
        hardware=hardware or {},
    )
    return write_atomically(path, page)


def _check_rows(rows) -> None:
    if not rows:
        raise ValueError("write_sweep_html: expected at least one row, got none")
    for index, row in enumerate(rows):
        missing = [key for key in REQUIRED_KEYS if row.get(key) is None]
        if missing:
            raise ValueError(
                f"write_sweep_html: expected rows[{index}] to have {', '.join(missing)}, "
                f"got {sorted(row)}"
            )


def _sweep_headlines(rows, accuracy_label) -> list[dict[str, object]]:
    """The fastest row that keeps the accuracy, and what it costs; the fastest of all failing that.

    A sweep's fastest row is often a model pruned to uselessness, so it does not lead by itself.
    """
    good = [row for row in rows if _keeps_accuracy(row)]
    row = max(good or rows, key=lambda row: row["speedup"])
    where = f"{row['pattern']} at {percent(row['sparsity'])}"
    kept = f", fastest that keeps {percent(KEPT_ACCURACY)} of the dense {accuracy_label}"
    headlines = [_gain(row["speedup"], "faster", "slower", where + (kept if good else ""))]
    if row.get("accuracy") is not None:
        dense = row.get("dense_accuracy")
        detail = "there" if dense is None else f"there; dense {dense:.3f}"
        headlines.append(_headline(f"{row['accuracy']:.3f}", accuracy_label, detail))
    if row.get("dense_bytes") and row.get("sparse_bytes"):
        ratio = row["dense_bytes"] / row["sparse_bytes"]
        headlines.append(_gain(ratio, "smaller weights", "larger weights", "there"))
    if row.get("dense_joules") and row.get("sparse_joules"):
        ratio = row["dense_joules"] / row["sparse_joules"]
        detail = f"there; {row.get('energy_source') or 'source not stated'}"
        headlines.append(_gain(ratio, "less energy", "more energy", detail))
    return headlines


def _keeps_accuracy(row) -> bool:
    accuracy, dense = row.get("accuracy"), row.get("dense_accuracy")
    return accuracy is not None and dense is not None and accuracy >= KEPT_ACCURACY * dense


def _sweep_figures(rows, accuracy_label) -> list[tuple[str, str]]:
    speed = plots.sweep_svg(_series(rows, "speedup"), "dense / sparse time", 1.0, "speedup")
    figures = [("Speed-up", speed)]
    accuracy = _series(rows, "accuracy")
    if accuracy:
        known = (row["dense_accuracy"] for row in rows if row.get("dense_accuracy") is not None)
        svg = plots.sweep_svg(accuracy, accuracy_label, next(known, None), "accuracy")
        figures.append((accuracy_label[0].upper() + accuracy_label[1:], svg))
    sized = [row for row in rows if row.get("dense_bytes") and row.get("sparse_bytes")]
    shares = [{**row, "share": 100 * row["sparse_bytes"] / row["dense_bytes"]} for row in sized]
    if shares:
        svg = plots.sweep_svg(_series(shares, "share"), "% of the dense bytes", 100.0, "size")
        figures.append(("Size of the weights", svg))
    return figures


def _series(rows, key: str) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(key) is not None:
            series.setdefault(str(row["pattern"]), []).append((row["sparsity"], row[key]))
    return series


def _sweep_table(rows, accuracy_label) -> dict[str, object]:
    """One row per configuration; a column nobody has a value for is left out."""
    extra = list(dict.fromkeys(key for row in rows for key in row if key not in ROW_KEYS))
    sources = {str(row.get("energy_source") or "") for row in rows}
    energy = f"energy, {sources.pop()}" if len(sources) == 1 and sources != {""} else "energy"
    columns = ["pattern", "sparsity", "speed-up", "latency", accuracy_label, "weights", energy]
    columns = [c.replace("_", " ") for c in [*columns, "layers sparse / dense", *extra]]
    cells = [_sweep_row(row, extra, "," not in energy) for row in rows]
    used = [i for i in range(len(columns)) if any(row[i] != MISSING for row in cells)]
    rows_used = [[row[i] for i in used] for row in cells]
    return _table("All configurations", [columns[i] for i in used], rows_used)


def _sweep_row(row, extra: Sequence[str], name_source: bool) -> tuple[str, ...]:
    get = row.get
    energy = _change(si(get("dense_joules"), "J"), si(get("sparse_joules"), "J"))
    if name_source and get("energy_source"):
        energy = f"{energy} ({get('energy_source')})"
    layers = MISSING
    if get("layers_sparse") is not None:
        layers = f"{row['layers_sparse']} / {get('layers_dense', MISSING)}"
    return (
        str(row["pattern"]),
        percent(row["sparsity"]),
        times(row["speedup"]),
        _change(milliseconds(get("dense_ms")), milliseconds(get("sparse_ms"))),
        _change(_number(get("dense_accuracy")), _number(get("accuracy"))),
        _change(si(get("dense_bytes"), "B"), si(get("sparse_bytes"), "B")),
        energy,
        layers,
        *(_number(get(key)) for key in extra),
    )


def _change(before: str, after: str) -> str:
    """The text "before → after", or whichever is known; a unit both share is written once."""
    if before == MISSING or after == MISSING:
        return after if before == MISSING else before
    unit = after.partition(" ")[2]
    if unit and before.endswith(f" {unit}"):
        before = before.removesuffix(f" {unit}")
    return f"{before} → {after}"


def _number(value) -> str:
    if value is None:
        return MISSING
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, object]:
    return {"title": title, "columns": columns, "rows": rows}


def _render(**content) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sparsekern.measure", package_path="."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(**content)
