"""Markdown tables from results, as `plot.py` reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from statistics import median

from sparsekern.measure.table import MISSING, milliseconds, percent, times

OURS = "sparsekern"
Point = dict


class ResultsError(ValueError):
    """Results or a README that cannot be used."""


def grouped(points: Iterable[Point], *keys: str) -> dict[tuple, list[Point]]:
    """Points by the values of some fields, in order of first appearance."""
    found: dict[tuple, list[Point]] = {}
    for point in points:
        found.setdefault(tuple(point[k] for k in keys), []).append(point)
    return found


def setting(dtype: str, threads: int) -> str:
    """`float32, 2 threads`."""
    return f"{dtype}, {threads} thread{'s' if threads > 1 else ''}"


def markdown(header: dict, points: list[Point], suite: str = "summary") -> str:
    """Speed-up over the best dense side: one table per dtype, threads and pattern, then how.

    Raises:
        ResultsError: the results hold no point of the suite.
    """
    chosen = [p for p in points if p["suite"] == suite]
    if not chosen:
        have = ", ".join(sorted({p["suite"] for p in points}))
        raise ResultsError(f"plot: expected points of suite {suite!r}, got suites {have}")
    parts = []
    for (dtype, threads, pattern), group in grouped(chosen, "dtype", "threads", "pattern").items():
        parts += [f"**{setting(dtype, threads)}, {pattern}**", _table(group)]
    return "\n\n".join([*parts, _footnote(header, chosen)])


def _table(points: list[Point]) -> str:
    sparsities = sorted({p["sparsity"] for p in points})
    head = ["layer", "best dense", *(percent(s) for s in sparsities)]
    lines = [head, ["---", "---", *["---:"] * len(sparsities)]]
    for (case,), group in grouped(points, "case").items():
        gains = {p["sparsity"]: p["speedup"]["median"] for p in group}
        # The dense time is that of a full matrix at every sparsity: one cell tells it.
        name = Counter(p["best_dense"] for p in group).most_common(1)[0][0]
        dense = median(p["sides"][p["best_dense"]]["median_ms"] for p in group)
        cells = [times(gains[s]) if s in gains else MISSING for s in sparsities]
        lines.append([case, f"{milliseconds(dense)}, {name}", *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _footnote(header: dict, points: list[Point]) -> str:
    """How and where the table was measured."""
    gains = [p["speedup"] for p in points]
    spread = max(max(g["p90"] / g["median"], g["median"] / g["p10"]) - 1 for g in gains)
    losses = sum(g["median"] < 1 for g in gains)
    machine = header["hardware"]
    return (
        "Times faster than the fastest dense kernel of the same layer (MKL, oneDNN, prepacked "
        f"and not), bias included; below 1x sparse loses ({losses} of {len(gains)} cells). Median "
        "of pairs of neighbouring samples; the 10th and 90th percentile lie within "
        f"{percent(round(spread, 2))} of it. {machine['cpu']}, {header['isa']}, torch "
        f"{machine['torch']}, {header['date'][:10]}, commit {header['commit'] or 'unknown'}."
    )


def models_markdown(header: dict, points: list[Point]) -> str:
    """Whole models: the time of every engine, one table per dtype and threads, then how.

    Raises:
        ResultsError: the results hold no whole model.
    """
    chosen = [p for p in points if p["kind"] == "model"]
    if not chosen:
        raise ResultsError("plot: expected points of whole models, got none")
    parts = []
    for (dtype, threads), group in grouped(chosen, "dtype", "threads").items():
        parts += [f"**whole models, {setting(dtype, threads)}**", _models_table(group)]
    return "\n\n".join([*parts, _models_footnote(header, chosen)])


def _models_table(points: list[Point]) -> str:
    peers = dict.fromkeys(
        name for p in points for name, side in p["sides"].items() if side["role"] == "peer"
    )
    head = ["model", "zeros", "best dense torch", OURS, "speed-up, p10 to p90", *peers]
    lines = [head, ["---", "---:", "---", "---", "---:", *["---:"] * len(peers)]]
    first = {name: i for i, name in enumerate(dict.fromkeys(p["case"] for p in points))}
    # A file grows in the order of the runs; the table goes by model, then by zeros.
    for p in sorted(points, key=lambda p: (first[p["case"]], p["sparsity"])):
        sides, gain = p["sides"], p["speedup"]
        ours = milliseconds(sides[p["best_ours"]]["median_ms"])
        lines.append([
            p["case"], percent(p["sparsity"]),
            f"{milliseconds(sides[p['best_dense']]['median_ms'])}, {p['best_dense']}",
            ours + p["best_ours"].removeprefix(OURS),
            f"{times(gain['median'])}, {gain['p10']:.2f} to {gain['p90']:.2f}",
            *(milliseconds(sides[n]["median_ms"]) if n in sides else MISSING for n in peers),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _models_footnote(header: dict, points: list[Point]) -> str:
    """How and where the whole models were measured."""
    left_out = {f"{p['case']}: {name}" for p in points for name in p["left_out"]}
    missing = f" Not measured: {'; '.join(sorted(left_out))}." if left_out else ""
    losses = sum(p["speedup"]["median"] < 1 for p in points)
    machine = header["hardware"]
    return (
        "Pruned by magnitude, every layer to the same share of zeros (MobileNetV2: all but the "
        "first and the depthwise convolutions). Best dense torch: the fastest of eager, folded and "
        "channels_last, torch.compile, and torch.compile with frozen weights. The other engines "
        "run the same weights, from one ONNX file. All sides took turns; below 1x sparse loses "
        f"({losses} of {len(points)} rows).{missing} {machine['cpu']}, {header['isa']}, torch "
        f"{machine['torch']}, {header['date'][:10]}, commit {header['commit'] or 'unknown'}."
    )
