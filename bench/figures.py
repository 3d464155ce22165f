"""Figures from points of single layers, as `plot.py` reads them; needs matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

from tables import OURS, Point, grouped, setting

from sparsekern.measure.table import percent

MARKERS = "osD^vP"


def draw(header: dict, points: list[Point], folder: Path, form: str) -> list[Path]:
    """Every figure the points allow; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for keys, group in grouped(points, "suite", "pattern", "dtype", "threads").items():
        name = "-".join(str(k).replace(":", "") for k in keys)
        many = len({p["sparsity"] for p in group}) > 1
        figure = speedup_figure(group) if many else bars_figure(group)
        written.append(_save(figure, header, folder / f"{name}t.{form}"))
        if many and any(percent_of_limit(p) is not None for p in group):
            path = folder / f"limit-{name}t.{form}"
            written.append(_save(limit_figure(group), header, path))
    swept = [g for g in curves(points).values() if len(g) > 1]
    for keys, group in grouped([p for g in swept for p in g], "dtype", "threads").items():
        name = f"crossover-{keys[0]}-{keys[1]}t.{form}"
        written.append(_save(crossover_figure(group), header, folder / name))
    return written


def _save(figure, header: dict, path: Path) -> Path:
    machine = header["hardware"]
    note = f"{machine['cpu']}, torch {machine['torch']}, {header['date'][:10]}"
    figure.supxlabel(note, fontsize=8, color="0.4")
    figure.savefig(path, dpi=150)
    return path


def _figure(title: str, width: float, height: float, columns: int = 1):
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _title(points: list[Point]) -> str:
    first = points[0]
    return f"{first['suite']}, {first['pattern']}, {setting(first['dtype'], first['threads'])}"


def sweep_figure(points: list[Point], value: Callable[[Point], float], band=None):
    """A value against sparsity, a line per case; `band(point)` gives the spread, drawn if few."""
    from matplotlib import colormaps

    cases = grouped(points, "case")
    figure, (ax,) = _figure(_title(points), 8.5, max(4.5, 1.5 + 0.2 * len(cases)))
    for i, ((case,), group) in enumerate(cases.items()):
        group = sorted(group, key=lambda p: p["sparsity"])
        xs, colour = [100 * p["sparsity"] for p in group], colormaps["tab20"](i % 20)
        ax.plot(xs, [value(p) for p in group], color=colour, label=case,
                marker=MARKERS[i // 20 % len(MARKERS)], markersize=4)  # fmt: skip
        if band is not None and len(cases) <= 8:
            low, high = zip(*map(band, group))
            ax.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.set_xlabel("sparsity, %")
    return figure, ax


def speedup_figure(points: list[Point]):
    """Speed-up against sparsity, a line per case, 1x and the ideal; p10 to p90 as bands if few."""
    figure, ax = sweep_figure(
        points,
        lambda p: p["speedup"]["median"],
        lambda p: (p["speedup"]["p10"], p["speedup"]["p90"]),
    )
    swept = sorted({p["sparsity"] for p in points})
    xs = [swept[0] + (swept[-1] - swept[0]) * i / 100 for i in range(101)]
    ax.plot([100 * x for x in xs], [1 / (1 - x) for x in xs], color="0.5", linestyle=":",
            label="ideal, 1 / (1 - sparsity)")  # fmt: skip
    ax.axhline(1, color="black", linewidth=1)
    _log_gains(ax)
    ax.set_ylabel("times faster than the best dense")
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return figure


def percent_of_limit(point: Point) -> float | None:
    """Share of the limit that binds: memory bandwidth for one token, else FMAs fed from L1."""
    return point["percent_memory_bandwidth" if point["tokens"] == 1 else "percent_l1_limit"]


def limit_figure(points: list[Point]):
    """Percent of the machine's limit against sparsity, a line per case."""
    known = [p for p in points if percent_of_limit(p) is not None]
    figure, ax = sweep_figure(known, percent_of_limit)
    ax.set_ylim(bottom=0)
    ax.axhline(100, color="black", linewidth=1)
    ax.set_ylabel("% of FMA rate from L1 (one token: of memory bandwidth)")
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return figure


def _log_gains(ax) -> None:
    """A logarithmic axis that says 0.5x, 2x, 5x: a loss looks as large as the gain it mirrors."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    ax.yaxis.set_minor_formatter(NullFormatter())


def bars_figure(points: list[Point]):
    """For a suite of one sparsity: speed-up and rate per case, side by side."""
    figure, (gain, rate) = _figure(
        f"{_title(points)}, {percent(points[0]['sparsity'])}", 9, 1.6 + 0.32 * len(points), 2
    )
    rows = range(len(points))
    medians = [p["speedup"]["median"] for p in points]
    gain.barh(rows, medians, color=["tab:blue" if m >= 1 else "tab:red" for m in medians])
    for y, p in enumerate(points):
        gain.plot([p["speedup"]["p10"], p["speedup"]["p90"]], [y, y], color="black", linewidth=1)
    gain.axvline(1, color="black", linewidth=1)
    gain.set_xlabel("times faster than the best dense")
    gain.set_yticks(rows, [p["case"] for p in points], fontsize=8)
    ours = [p["effective_gflops"] for p in points]
    rate.barh(rows, ours, color="tab:blue", height=0.4, label=OURS)
    dense = [p["effective_gflops"] * _ms(p, OURS) / _ms(p, p["best_dense"]) for p in points]
    rate.barh([y + 0.4 for y in rows], dense, color="0.7", height=0.4, label="best dense")
    rate.set_xlabel("effective GFLOP/s (zeros counted)")
    rate.set_yticks([])
    rate.legend(fontsize=8, frameon=False)
    for ax in (gain, rate):
        ax.invert_yaxis()
    return figure


def _ms(point: Point, side: str) -> float:
    return point["sides"][side]["median_ms"]


def curves(points: list[Point]) -> dict[tuple, list[Point]]:
    """Points of each case and pattern at rising sparsity; a case in two suites counts once."""
    found = {}
    for key, group in grouped(points, "dtype", "threads", "case", "pattern").items():
        unique = {p["sparsity"]: p for p in group}
        found[key] = [unique[s] for s in sorted(unique)]
    return found


def crossover(points: list[Point]) -> float:
    """Sparsity from which on sparse wins, interpolated in the logarithm of the speed-up.

    -inf where it wins at every sparsity measured, inf where it loses at the highest.
    """
    logs = [(p["sparsity"], math.log(p["speedup"]["median"])) for p in points]
    if logs[-1][1] < 0:
        return math.inf
    for (s0, low), (s1, high) in reversed(list(itertools.pairwise(logs))):
        if low < 0:
            return s0 + (s1 - s0) * -low / (high - low)
    return -math.inf


def crossover_figure(points: list[Point]):
    """The sparsity at which sparse starts to win, per case and pattern."""
    found = curves(points)
    names = list(dict.fromkeys(case for _, _, case, _ in found))
    patterns = list(dict.fromkeys(pattern for *_, pattern in found))
    title = f"crossover, {setting(points[0]['dtype'], points[0]['threads'])}"
    figure, (ax,) = _figure(title, 8, 1.8 + 0.24 * len(names))
    for (_, _, case, pattern), group in found.items():
        low, high = group[0]["sparsity"], group[-1]["sparsity"]
        at, i = crossover(group), patterns.index(pattern)
        # An arrow where the curve never crosses 1x inside what was measured.
        marker = "<" if at < low else ">" if at > high else MARKERS[i % len(MARKERS)]
        y = names.index(case) + 0.25 * (i - (len(patterns) - 1) / 2)  # side by side, not on top
        ax.plot(100 * min(max(at, low), high), y, marker, color=f"C{i}", markersize=5)
    for i, pattern in enumerate(patterns):
        ax.plot([], [], MARKERS[i % len(MARKERS)], color=f"C{i}", label=pattern)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("sparsity from which on sparse wins, %  (< wins everywhere measured, > nowhere)")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
