"""Tables and figures of all results, into a page of the documentation.

    python examples/pruning/page.py         # docs/experiments.md and docs/experiments/*.png

What stands between the markers of the page is written here; the text around them by hand.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import accuracy
import gradual
import rigl
import snip
from claims import CLAIMS, gaps, verdict
from curves import draw, draw_sensitivity
from frame import RESULTS
from records import Records, RecordsError, update_page
from results import Point, points, series, summary

from sparsekern.measure.table import percent

OF_LINES = {"accuracy": accuracy, "snip": snip, "gradual": gradual, "rigl": rigl}
BASELINES = (
    "random after training", "magnitude, layer by layer", "random at start, uniform",
    "random units", "random mask", "random, LeNet-5", "small, dense",
)  # fmt: skip
TICKETS = (
    "ticket", "ticket, to epoch 1", "ticket, learning rate alone", "new weights", "random mask",
)  # fmt: skip
REWOUND = {0: "", 1: ", to epoch 1", "rate": ", learning rate alone"}


def mean_text(found: tuple[float, float, int]) -> str:
    """A mean with its deviation, and the number of seeds where there are fewer than three."""
    mean, deviation, count = found
    spread = f" ± {deviation:.1f}" if count > 1 else ""
    return f"{mean:.1f}{spread}" + (f" ({count})" if count < 3 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; all columns but the first to the right."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))


def lines_table(found: Sequence[Point], names: Sequence[str]) -> str:
    """Accuracy of lines by sparsity; where known, that before retraining in brackets."""
    after = {name: series(found, name) for name in names}
    before = {name: series(found, name, "pruned") for name in names}
    columns = sorted({s for line in after.values() for s in line})
    rows = []
    for name in (name for name in names if after[name]):
        cells = []
        for s in columns:
            cell = mean_text(after[name][s]) if s in after[name] else ""
            cells.append(f"{cell} [{before[name][s][0]:.0f}]" if s in before[name] else cell)
        rows.append([name, *cells])
    return table(["", *map(percent, columns)], rows)


def claims_table(region: str, found: Sequence[Point]) -> list[str]:
    """The expected orders of a region with what came out, as a paragraph; none without results."""
    chosen = [(claim, gaps(claim, found)) for claim in CLAIMS if claim.region == region]
    columns = sorted({s for _, by_sparsity in chosen for s in by_sparsity})
    rows = []
    for claim, seen in chosen:
        cells = [f"{verdict(seen[s])} {summary(seen[s])[0]:+.1f}" if s in seen else ""
                 for s in columns]  # fmt: skip
        rows.append([f"{claim.text} ({claim.source})", *cells])
    return [table(["expected", *map(percent, columns)], rows)] if columns else []


def source(records: Records) -> str:
    """What the results of a file were computed with."""
    head = records.header
    settings, machine = head["settings"], head["hardware"]
    seeds = len({record["key"]["seed"] for record in records.done.values()})
    return (
        f"{len(records.done)} results, {seeds} seeds, {settings['dataset']}, "
        f"{settings['train']:,} training images, {settings['epochs']} + {settings['tune']} epochs "
        f"in batches of {settings['batch']}. {machine['cpu']}, torch {machine['torch']}, "
        f"{head['date'][:10]}, commit {head['commit']}."
    )


class Page:
    """Writes the regions, and the figures into the folder of the results."""

    def __init__(self, folder: Path):
        self.folder = folder

    def regions(self) -> dict[str, str]:
        """The text of every region that has results, by name."""
        found = {}
        lines = Records(self.folder / "lines.jsonl")
        for name, experiment in OF_LINES.items() if lines.done else ():
            found[name] = self._of_lines(name, experiment.GROUPS, lines)
        others = ("damage", self._damage), ("lottery", self._lottery)
        for name, write in (*others, ("sensitivity", self._sensitivity)):
            records = Records(self.folder / f"{name}.jsonl")
            if records.done:
                found[name] = write(records)
        return found

    def _of_lines(self, region: str, groups: dict, records: Records) -> str:
        found = points(records)
        dense = series(found, "dense").get(0.0)
        parts = [f"Dense: {mean_text(dense)}."] if dense else []
        for number, (title, lines) in enumerate(groups.items(), 1):
            names = [line.name for line in lines if series(found, line.name)]
            several = any(len(series(found, name)) > 1 for name in names)
            own = any(name.startswith("dense, ") for name in names)
            if several:
                file = self.folder / f"{region}-{number}.png"
                draw(file, title, found, names, BASELINES, None if own else dense)
                parts.append(self._image(file, title))
            if names:
                parts.append(f"**{title}**\n\n{lines_table(found, names)}")
        return "\n\n".join([*parts, *claims_table(region, found), source(records)])

    def _damage(self, records: Records) -> str:
        found = points(records)
        names = list(dict.fromkeys(point.line for point in found))
        lines = {name: series(found, name, "rise") for name in names}
        columns = sorted({s for line in lines.values() for s in line})
        rows = [[name, *(mean_text(line[s]) for s in columns)] for name, line in lines.items()]
        parts = [table(["", *map(percent, columns)], rows), *claims_table("damage", found)]
        return "\n\n".join([*parts, source(records)])

    def _lottery(self, records: Records) -> str:
        found = points(records, lambda key: REWOUND[key["rewind"]])
        file = draw(self.folder / "lottery.png", "lottery tickets", found, TICKETS, BASELINES)
        parts = [self._image(file, "lottery tickets"), lines_table(found, TICKETS)]
        return "\n\n".join([*parts, *claims_table("lottery", found), source(records)])

    def _sensitivity(self, records: Records) -> str:
        networks: dict[str, list[dict]] = {}
        for record in records.done.values():
            networks.setdefault(record["key"]["network"], []).append(record)
        curves = {name: [r["curves"] for r in found] for name, found in networks.items()}
        file = draw_sensitivity(self.folder / "sensitivity.png", curves)
        rows = []
        for network, found in networks.items():
            zeros = mean_text(summary([100 * r["points"][0]["sparsity"] for r in found]))
            dense = mean_text(summary([r["dense"] for r in found]))
            for place, point in enumerate(found[0]["points"]):
                sides = ([r["points"][place][metric] for r in found]
                         for metric in ("pruned", "accuracy"))  # fmt: skip
                rows.append([f"{network}, {point['line']}", zeros, dense,
                             *(mean_text(summary(side)) for side in sides)])  # fmt: skip
        head = ["", "zeros, %", "dense", "pruned", "retrained"]
        return "\n\n".join([self._image(file, "sensitivity"), table(head, rows), source(records)])

    def _image(self, file: Path, title: str) -> str:
        return f"![{title}]({self.folder.name}/{file.name})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSONL files")
    parser.add_argument("--page", type=Path, default=RESULTS.parent / "experiments.md")
    options = parser.parse_args(arguments)
    regions = Page(options.results).regions()
    update_page(options.page, regions)
    print(f"wrote {', '.join(regions) or 'nothing'} to {options.page}")


if __name__ == "__main__":
    try:
        main()
    except (RecordsError, OSError) as error:
        sys.exit(str(error))
