"""Figures and the README's table from the results of run.py.

`python bench/plot.py bench/results/*.jsonl` draws, `--table` prints the markdown table,
`--update README.md` writes it between the markers of that file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from sparsekern.measure import write_atomically
from sparsekern.measure.table import MISSING, milliseconds, percent, times

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
OURS = "sparsekern"
MARKERS = "osD^vP"
Point = dict


class ResultsError(ValueError):
    """Results or a README that cannot be used."""


def main(arguments: list[str] | None = None) -> int:
    """Draw or tabulate; returns the exit status."""
    parser = argparse.ArgumentParser(prog="plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSONL files of run.py")
    parser.add_argument("--table", action="store_true", help="print the markdown table, no figures")
    parser.add_argument("--update", type=Path, metavar="README",
                        help="write the table between the markers of this file")  # fmt: skip
    parser.add_argument("--suite", default="summary", help="suite of the table (default summary)")
    parser.add_argument("--out", type=Path, help="folder of the figures (default: of the results)")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    options = parser.parse_args(arguments)
    try:
        header, points = read_results(options.results)
        if options.table or options.update:
            text = markdown(header, points, options.suite)
            if options.table:
                print(text)
            if options.update:
                update(options.update, text)
            return 0
        for path in draw(header, points, options.out or options.results[0].parent, options.format):
            print(path)
    except (ResultsError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def read_results(paths: Iterable[Path]) -> tuple[dict, list[Point]]:
    """The last header and all points; of points measured again the last one counts.

    A torn line, left by a run that was killed, is skipped with a warning.

    Raises:
        ResultsError: no points, points before any header, or results of several CPUs.
    """
    headers, points = [], {}
    for path in paths:
        own = None  # a header speaks for the points that follow it in its file
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
            except ValueError:
                warnings.warn(f"plot: skipped {path}, line {number}: not JSON", stacklevel=2)
                continue
            if record["type"] == "header":
                own = record
                headers.append(record)
                continue
            if own is None:
                raise ResultsError(f"plot: expected a header first in {path}, got a point")
            points[_key(record)] = record
    if not points:
        raise ResultsError("plot: expected results with at least one point, got none")
    machines = sorted({h["hardware"]["cpu"] for h in headers})
    if len(machines) > 1:
        raise ResultsError(f"plot: expected results of one CPU, got {', '.join(machines)}")
    return headers[-1], list(points.values())


def _key(point: Point) -> tuple:
    return tuple(point[k] for k in ("suite", "case", "pattern", "sparsity", "dtype", "threads"))


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


def update(path: Path, text: str) -> None:
    """Replace what stands between the markers of a file, atomically.

    Raises:
        ResultsError: the file does not hold each marker exactly once, start before end.
    """
    old = path.read_text(encoding="utf-8")
    counts = old.count(START), old.count(END)
    if counts != (1, 1) or old.index(START) > old.index(END):
        raise ResultsError(
            f"plot: expected one {START} before one {END} in {path}, "
            f"got {counts[0]} and {counts[1]}" + (" in the wrong order" * (counts == (1, 1)))
        )
    before, rest = old.split(START)
    write_atomically(path, f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")


def draw(header: dict, points: list[Point], folder: Path, form: str) -> list[Path]:
    """Every figure the points allow; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for keys, group in grouped(points, "suite", "pattern", "dtype", "threads").items():
        name = "-".join(str(k).replace(":", "") for k in keys)
        many = len({p["sparsity"] for p in group}) > 1
        figure = speedup_figure(group) if many else bars_figure(group)
        written.append(_save(figure, header, folder / f"{name}t.{form}"))
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


def speedup_figure(points: list[Point]):
    """Speed-up against sparsity, a line per case, 1x and the ideal; p10 to p90 as bands if few."""
    from matplotlib import colormaps

    cases = grouped(points, "case")
    figure, (ax,) = _figure(_title(points), 8.5, max(4.5, 1.5 + 0.2 * len(cases)))
    for i, ((case,), group) in enumerate(cases.items()):
        group = sorted(group, key=lambda p: p["sparsity"])
        xs = [100 * p["sparsity"] for p in group]
        gains = [p["speedup"] for p in group]
        colour = colormaps["tab20"](i % 20)
        ax.plot(xs, [g["median"] for g in gains], color=colour, label=case,
                marker=MARKERS[i // 20 % len(MARKERS)], markersize=4)  # fmt: skip
        if len(cases) <= 8:
            ax.fill_between(xs, [g["p10"] for g in gains], [g["p90"] for g in gains],
                            color=colour, alpha=0.15, linewidth=0)  # fmt: skip
    swept = sorted({p["sparsity"] for p in points})
    xs = [swept[0] + (swept[-1] - swept[0]) * i / 100 for i in range(101)]
    ax.plot([100 * x for x in xs], [1 / (1 - x) for x in xs], color="0.5", linestyle=":",
            label="ideal, 1 / (1 - sparsity)")  # fmt: skip
    ax.axhline(1, color="black", linewidth=1)
    _log_gains(ax)
    ax.set_xlabel("sparsity, %")
    ax.set_ylabel("times faster than the best dense")
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


if __name__ == "__main__":
    sys.exit(main())
