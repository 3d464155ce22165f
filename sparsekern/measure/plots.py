"""Plots as inline SVG that follow the page's colours, so one file serves light and dark.

Every colour is a placeholder that becomes a CSS variable of the page; text stays text, in the
page's own font. The figures are small, since a phone shows them one below the other.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

# Colours no plot would choose by itself, and the CSS variables that take their place.
INK, FAINT = "#010203", "#040506"
SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006", "#0a0007")
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--line)",
    **{colour: f"var(--s{i})" for i, colour in enumerate(SERIES)},
}
DENSE, SPARSE = SERIES[0], SERIES[1]
MARKERS = ("o", "s", "^", "D", "v", "P")


def _figure(height: float = 2.7):
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(4.6, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.set_axisbelow(True)
    return figure, axes


def _label(axes, text: str, x: float, y: float) -> None:
    """Text just right of a point."""
    axes.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center",
                  color=INK, fontsize=9)  # fmt: skip


def _svg(figure, name: str) -> str:
    """The figure as an SVG element; `name` keeps the ids of several figures on a page apart."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text)
    text = re.sub(r"font: (\d[\d.]*px) [^;\"]*", r"font-size: \1", text)
    # The ids Matplotlib gives to groups repeat in every figure; nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def latency_svg(dense_ms: Sequence[float], sparse_ms: Sequence[float]) -> str:
    """Median time with a line from the 10th to the 90th percentile.

    Args:
        dense_ms: (p10, median, p90) of the dense model, milliseconds.
        sparse_ms: the same of the sparse model.
    """
    figure, axes = _figure(1.7)
    for y, (colour, values) in enumerate(((SPARSE, sparse_ms), (DENSE, dense_ms))):
        low, median, high = values
        axes.barh(y, median, color=colour, height=0.55)
        axes.plot([low, high], [y, y], color=INK, linewidth=1.5)
        _label(axes, f"{median:.3g}", max(high, median), y)
    axes.set_yticks([0, 1], ["sparse", "dense"])
    axes.set_xlim(0, 1.18 * max(*dense_ms, *sparse_ms))
    axes.set_xlabel("ms per pass (line: p10 to p90)", color=INK, fontsize=9)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    return _svg(figure, "latency")


def bars_svg(shares: Mapping[str, float]) -> str:
    """Sparse as a share of dense, one bar per metric; the dense model is the line at 100 %.

    Args:
        shares: metric to sparse / dense.
    """
    figure, axes = _figure(0.75 + 0.42 * len(shares))
    for y, (name, share) in enumerate(reversed(shares.items())):
        axes.barh(y, share * 100, color=SPARSE, height=0.55)
        _label(axes, f"{share * 100:.0f} %", share * 100, y)
        axes.text(-0.02, y, name, transform=axes.get_yaxis_transform(), ha="right", va="center",
                  color=INK, fontsize=9)  # fmt: skip
    axes.set_yticks([])
    axes.axvline(100, color=DENSE, linewidth=1.5)
    axes.set_xlim(0, 1.18 * max(100, *(100 * s for s in shares.values())))
    axes.set_xlabel("sparse as % of dense (line: dense)", color=INK, fontsize=9)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    return _svg(figure, "shares")


def layers_svg(layers: Sequence[Mapping[str, object]]) -> str:
    """Speed-up of each timed layer, in the model's order; layers kept dense are hollow.

    Args:
        layers: dicts with `format`, `dense_ms` and `sparse_ms` (None where not timed).
    """
    figure, axes = _figure()
    timed = [e for e in layers if e["dense_ms"] and e["sparse_ms"]]
    for x, layer in enumerate(timed):
        gain = layer["dense_ms"] / layer["sparse_ms"]
        kept = layer["format"] == "dense"
        axes.bar(x, gain, color="none" if kept else SPARSE, edgecolor=DENSE if kept else SPARSE)
    axes.axhline(1, color=DENSE, linewidth=1.5)
    axes.set_xlabel("layer (hollow: kept dense)", color=INK, fontsize=9)
    axes.set_ylabel("dense / sparse time", color=INK, fontsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    return _svg(figure, "layers")


def sweep_svg(
    series: Mapping[str, Sequence[tuple[float, float]]], label: str, base: float | None, name: str
) -> str:
    """One line per pattern over sparsity.

    Args:
        series: pattern to points (sparsity, value).
        label: what the value is, with its unit.
        base: value of the dense model, drawn as a line; None for no line.
        name: distinguishes this figure on its page.
    """
    figure, axes = _figure()
    for i, (pattern, points) in enumerate(series.items()):
        xs, ys = zip(*sorted(points), strict=True)
        colour = SERIES[1 + i % (len(SERIES) - 1)]
        axes.plot([100 * x for x in xs], ys, color=colour, linewidth=2, markersize=5,
                  marker=MARKERS[i % len(MARKERS)], label=pattern)  # fmt: skip
    if base is not None:
        axes.axhline(base, color=DENSE, linewidth=1.5, linestyle="--", label="dense")
    axes.set_xlabel("sparsity, %", color=INK, fontsize=9)
    axes.set_ylabel(label, color=INK, fontsize=9)
    axes.grid(color=FAINT, linewidth=0.6)
    figure.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=2, loc="outside upper left")
    return _svg(figure, name)
