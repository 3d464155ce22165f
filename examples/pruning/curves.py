"""The figures: accuracy against what is left, and the sensitivity of layers."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from results import Point, series, summary

from sparsekern.measure.table import percent

MARKERS = "osD^vPX*<>"
STYLES = ("-", ":", "-.")  # of each ten lines
RANGE = 30  # points of accuracy that a figure shows; networks that died lie below


def draw(
    path: Path,
    title: str,
    found: Sequence[Point],
    names: Sequence[str],
    baselines: Sequence[str] = (),
    dense: tuple[float, float, int] | None = None,
) -> Path:
    """Draw mean and deviation of every line over the share of zeros.

    Args:
        path: Image file.
        title: Of the figure.
        found: Points of these lines and others.
        names: Lines, in the order of the legend.
        baselines: Those of them to draw dashed and grey.
        dense: Accuracy of the dense network, drawn as a band.
    """
    figure, (axes,) = _figure(1, 8.2, 4.6)
    axes.set(title=title, xlabel="zeros", ylabel="test accuracy, %")
    if dense is not None:
        mean, deviation, _ = dense
        axes.axhspan(mean - deviation, mean + deviation, color="0.85", label="dense")
    colours, marks = cycle(f"C{i}" for i in range(10)), cycle(MARKERS)
    ticks: set[float] = set()
    for number, name in enumerate(names):
        line = series(found, name)
        ticks |= set(line)
        dashed = name in baselines
        axes.errorbar(
            [1 - s for s in line],
            [mean for mean, _, _ in line.values()],
            [deviation for _, deviation, _ in line.values()],
            label=name,
            color="0.3" if dashed else next(colours),
            linestyle="--" if dashed else STYLES[number // 10],
            marker=next(marks),
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )
    _by_density(axes, sorted(ticks))
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, high - RANGE), high)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=130)
    return path


def draw_sensitivity(path: Path, networks: Mapping[str, Sequence[Mapping]]) -> Path:
    """Draw held-out accuracy against the sparsity of one layer, a plot for each network.

    Args:
        path: Image file.
        networks: By name, `Sensitivity.to_dict()` of every seed.
    """
    figure, all_axes = _figure(len(networks), 4.2 * len(networks), 3.8)
    for axes, (network, seeds) in zip(all_axes, networks.items()):
        axes.set(title=network, xlabel="zeros in this layer", ylabel="held-out accuracy, %")
        dense = summary([seed["baseline"] for seed in seeds])[0]
        axes.axhline(dense, color="0.6", linestyle="--")
        marks = cycle(MARKERS)
        for layer in seeds[0]["scores"]:
            columns = zip(*(seed["scores"][layer] for seed in seeds))
            found = [summary(column) for column in columns]
            means, deviations = [f[0] for f in found], [f[1] for f in found]
            kept = [1 - s for s in seeds[0]["sparsities"]]
            axes.errorbar(kept, means, deviations, label=layer, marker=next(marks), markersize=3,
                          linewidth=1, capsize=2)  # fmt: skip
        _by_density(axes, seeds[0]["sparsities"])
        axes.legend(fontsize=6, frameon=False)
    figure.savefig(path, dpi=130)
    return path


def _by_density(axes, sparsities: Sequence[float]) -> None:
    """Sparsity to the right, spaced by the logarithm of what is left."""
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks([1 - s for s in sparsities], map(percent, sparsities), fontsize=7)
    axes.minorticks_off()


def _figure(columns: int, width: float, height: float):
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes = figure.subplots(1, columns, squeeze=False)[0]
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.6)
    return figure, all_axes
