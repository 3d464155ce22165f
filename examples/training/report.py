"""Tables and figures of the training and one-shot experiments, into a page of the documentation.

    python examples/training/report.py     # docs/training.md and docs/experiments/training.svg

What stands between the markers of the page is written here; the text around them by hand.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.append(str(EXAMPLES / "pruning"))
from records import Records, RecordsError, update_page  # noqa: E402

from sparsekern.measure.table import milliseconds, percent, si, times  # noqa: E402

DOCS = EXAMPLES.parent / "docs"
LABELS = {"mlp": "MLP", "cnn": "CNN", "lm": "small Llama", "minilm": "all-MiniLM-L6-v2"}
METRICS = {
    "lm": [("perplexity", "perplexity per byte")],
    "minilm": [("wordsim", "WordSim-353"), ("lee", "Lee")],
}
MARKERS = {"dense": "s", "masked": "D", "unstructured": "o", "block:16x16": "^"}


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation; the value alone where there is one."""
    text = f"{mean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; all columns but the first to the right."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))


def by_network(records: Records) -> dict[str, list[dict]]:
    """The records of each network, one for each seed."""
    found: dict[str, list[dict]] = {}
    for record in records.done.values():
        found.setdefault(record["key"]["network"], []).append(record)
    return found


def gains(records: Sequence[dict], name: str, clock: str) -> list[float]:
    """Dense time over a side's time, by the median step, for every seed; clock: wall or cpu."""
    key = f"{clock}_ms"
    return [r["sides"]["dense"][key][1] / r["sides"][name][key][1] for r in records]


def training_table(records: Sequence[dict]) -> str:
    """What every side of a network cost and how good it is."""
    head = [
        "", "accuracy, %", "a step", "step: dense / it", "by processor time", "all steps",
        "all: dense / it", "prune + convert", "peak memory", "energy of a step, modelled",
    ]  # fmt: skip
    rows, base = [], [record["sides"]["dense"] for record in records]
    for name in records[0]["sides"]:
        sides = [record["sides"][name] for record in records]

        def average(key, sides=sides):
            return mean(side[key] for side in sides)

        rows.append([
            name,
            spread([side["accuracy"] for side in sides], 1),
            milliseconds(mean(side["wall_ms"][1] for side in sides)),
            times(mean(gains(records, name, "wall"))),
            times(mean(gains(records, name, "cpu"))),
            f"{average('wall_s'):.1f} s",
            times(mean(dense["wall_s"] / side["wall_s"] for dense, side in zip(base, sides))),
            f"{average('made_s'):.1f} s",
            si(average("peak_bytes"), "B"),
            si(average("joules"), "J"),
        ])  # fmt: skip
    return table(head, rows)


def draw_training(path: Path, networks: dict[str, list[dict]]) -> None:
    """Draw accuracy over the processor time of a whole training, a plot for each network."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(networks), 3.6), layout="constrained")
    for axes, (network, records) in zip(
        figure.subplots(1, len(networks), squeeze=False)[0], networks.items()
    ):
        axes.set(title=LABELS[network], xlabel="whole training, processor s",
                 ylabel="test accuracy, %", ylim=(0, 100))  # fmt: skip
        for name in records[0]["sides"]:
            sides = [record["sides"][name] for record in records]
            kind = name.split(" ")[name.startswith("sparse ")]  # "sparse block:16x16 0.9"
            scores = [side["accuracy"] for side in sides]
            x, y = mean(side["cpu_s"] for side in sides), mean(scores)
            error = stdev(scores) if len(scores) > 1 else None
            colour = f"C{list(MARKERS).index(kind)}"
            axes.errorbar(x, y, error, marker=MARKERS[kind], color=colour, capsize=2)
            below = {"block:16x16": -11, "unstructured": 5}.get(kind, 0) - 26 * ("epochs" in name)
            share, *rest = name.split(" ", 2)[-1].split(", ")
            label = ", ".join([percent(float(share)), *rest]) if kind != name else ""
            axes.annotate("" if kind == "masked" else label, (x, y), xytext=(3, below),
                          textcoords="offset points", fontsize=7)  # fmt: skip
        for kind, marker in MARKERS.items():
            colour = f"C{list(MARKERS).index(kind)}"
            axes.plot([], [], marker=marker, color=colour, linestyle="", label=kind)
        axes.set_xlim(left=0)
        axes.legend(fontsize=7, frameon=False, loc="lower right")
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def training(records: Records, folder: Path) -> str:
    """The region of the training experiment."""
    networks = by_network(records)
    draw_training(folder / "training.svg", networks)
    parts = [f"![accuracy over training time]({folder.name}/training.svg)"]
    settings = records.header["settings"]
    for network, found in networks.items():
        forms = {name: mean(r["dense_forms_ms"][name] for r in found)
                 for name in found[0]["dense_forms_ms"]}  # fmt: skip
        contest = ", ".join(f"{name} {milliseconds(ms)}" for name, ms in forms.items())
        each = {name: settings[name][network] for name in ("width", "batch", "train", "epochs")}
        steps = found[0]["sides"]["dense"]["steps"]
        parts += [
            f"**{LABELS[network]}**, width {each['width']}: {steps} steps, {each['epochs']} epochs "
            f"of {each['train']:,} images in batches of {each['batch']}, {len(found)} seeds. Forms "
            f"of the dense network, a step, the fastest is taken: {contest}.",
            training_table(found),
        ]
    return "\n\n".join([*parts, source(records)])


def oneshot(records: Records) -> str:
    """The region of the one-shot experiment."""
    groups: dict[tuple, list[dict]] = {}
    for record in records.done.values():
        key = record["key"]
        groups.setdefault((key["model"], key["method"], key.get("pattern", "")), []).append(record)
    parts = []
    for model, metrics in METRICS.items():
        rows = []
        for (name, method, pattern), found in groups.items():
            if name != model:
                continue
            cells = [spread([r[metric] for r in found], 3) for metric, _ in metrics]
            zeros = percent(mean(r.get("sparsity", 0.0) for r in found))
            took = f"{mean(r['prune_s'] for r in found):.0f} s" if pattern else ""
            rows.append([method, pattern, zeros, *cells, str(len(found)), took])
        if rows:
            head = ["", "pattern", "zeros", *(label for _, label in metrics), "draws", "pruning"]
            parts += [f"**{LABELS[model]}**", table(head, rows)]
    return "\n\n".join([*parts, source(records)])


def source(records: Records) -> str:
    """What the results were computed with."""
    head = records.header
    machine = head["hardware"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return (
        f"{machine['cpu']}, {threads}, torch {machine['torch']}, {head['date'][:10]}, "
        f"commit {head['commit']}. Settings: `{head['settings']}`"
    )


def main(arguments: list[str] | None = None) -> int:
    """Write the regions that have results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=DOCS / "experiments")
    parser.add_argument("--page", type=Path, default=DOCS / "training.md")
    options = parser.parse_args(arguments)
    found = {}
    try:
        records = Records(options.results / "training.jsonl")
        if records.done:
            found["training"] = training(records, options.results)
        records = Records(options.results / "oneshot.jsonl")
        if records.done:
            found["oneshot"] = oneshot(records)
        update_page(options.page, found)
    except (RecordsError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {', '.join(found) or 'nothing'} to {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
