"""Numbers as people read them, and the comparison as a text table."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsekern.measure.compare import Comparison

MISSING = "\u2013"  # an en dash


def si(value: float | None, unit: str) -> str:
    """Three significant digits with a decimal prefix: `si(0.0123, "J")` is "12.3 mJ"."""
    if value is None:
        return MISSING
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}"
    for factor, prefix in (
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1, ""),
        (1e-3, "m"),
        (1e-6, "µ"),
    ):
        if abs(value) >= factor * 0.9995:
            return f"{_digits(value / factor)} {prefix}{unit}"
    return f"{_digits(value * 1e9)} n{unit}"


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:#.3g}".rstrip(".")


def times(value: float | None) -> str:
    """A ratio: "3.42x"."""
    return MISSING if value is None else f"{value:.2f}x"


def milliseconds(value: float | None) -> str:
    """Milliseconds with three significant digits."""
    return MISSING if value is None else si(value * 1e-3, "s")


def percent(value: float | None) -> str:
    """A share as a percentage without needless digits: 0.9 is "90 %"."""
    return MISSING if value is None else f"{value * 100:.4g} %"


def comparison_rows(c: Comparison) -> list[tuple[str, str, str, str]]:
    """Rows (metric, dense, sparse, gain) of a comparison, as text."""
    dense, sparse = c.dense, c.sparse
    spread = f"{times(c.speedup.median)} ({c.speedup.p10:.2f} to {c.speedup.p90:.2f})"
    rows = [
        ("latency, median", *_pair(c, lambda s: milliseconds(s.latency.median_ms)), spread),
        ("latency, p10", *_pair(c, lambda s: milliseconds(s.latency.p10_ms)), ""),
        ("latency, p90", *_pair(c, lambda s: milliseconds(s.latency.p90_ms)), ""),
        (
            f"throughput, {c.unit}/s",
            *_pair(c, lambda s: si(s.throughput, "").strip()),
            times(sparse.throughput / dense.throughput),
        ),
        ("weights", *_pair(c, lambda s: si(s.weight_bytes, "B")), times(c.size_ratio)),
        ("unsaved buffers", *_pair(c, lambda s: si(s.extra_buffer_bytes, "B")), ""),
        (
            "peak memory of a pass",
            *_pair(c, lambda s: si(s.peak_bytes, "B")),
            _ratio(dense.peak_bytes, sparse.peak_bytes),
        ),
        *_energy_rows(c),
        ("output error, absolute", "", f"{c.max_abs_error:.2e}", ""),
        ("output error, relative", "", f"{c.max_rel_error:.2e}", ""),
    ]
    if c.layers_sparse is not None:
        rows.append(("layers sparse / kept dense", "", f"{c.layers_sparse} / {c.layers_dense}", ""))
    return rows


def _pair(c: Comparison, text) -> tuple[str, str]:
    return text(c.dense), text(c.sparse)


def _ratio(dense: float | None, sparse: float | None) -> str:
    return times(dense / sparse) if dense and sparse else ""


def _energy_rows(c: Comparison) -> list[tuple[str, str, str, str]]:
    """Gross and, where idle power was measured, net joules; or the words "not available"."""
    dense, sparse = c.dense.energy, c.sparse.energy
    if dense.joules is None or sparse.joules is None:
        return [("energy per pass", dense.source, sparse.source, "")]
    label = f"energy per pass ({dense.source})"
    rows = [(label, si(dense.joules, "J"), si(sparse.joules, "J"), times(c.energy_ratio))]
    if dense.net_joules is not None and sparse.net_joules is not None:
        gain = _ratio(dense.net_joules, sparse.net_joules) if sparse.net_joules > 0 else ""
        net = (si(dense.net_joules, "J"), si(sparse.net_joules, "J"))
        rows.append(("energy above idle", *net, gain))
    return rows


def text_table(title: str, columns: list[str], rows: list[tuple[str, ...]]) -> str:
    """A table as text without colours; the first column is left-aligned, the rest right.

    It is as wide as its content, whatever the terminal, so that a file gets the same lines.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=1000, color_system=None)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def comparison_table(c: Comparison) -> str:
    """A comparison as a text table with the machine as its title."""
    title = f"{c.hardware['cpu']}, {c.hardware['threads']} thread(s), torch {c.hardware['torch']}"
    table = text_table(title, ["", "dense", "sparse", "gain"], comparison_rows(c))
    reason = c.sparse.energy.reason
    if c.sparse.energy.joules is None and reason:
        table += f"\nenergy: {reason}"
    if c.reverted:
        table += "\nthe conversion lost against the dense model as a whole and went back to it"
    return table
