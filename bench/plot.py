"""Figures and the README's tables from the results of run.py and models.py.

`python bench/plot.py bench/results/*.jsonl` draws, `--table` prints the markdown table,
`--update README.md` writes it between the markers of that file.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import figures
from tables import Point, ResultsError, markdown, models_markdown

from sparsekern.measure import write_atomically

LAYERS, MODELS = "bench", "bench-models"  # names of the regions in a README


def main(arguments: list[str] | None = None) -> int:
    """Draw or tabulate; returns the exit status."""
    parser = argparse.ArgumentParser(prog="plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSONL files of run.py and models.py")
    parser.add_argument("--table", action="store_true", help="print the markdown table, no figures")
    parser.add_argument("--update", type=Path, metavar="README",
                        help="write the tables between the markers of this file")  # fmt: skip
    parser.add_argument("--suite", default="summary", help="suite of the table (default summary)")
    parser.add_argument("--out", type=Path, help="folder of the figures (default: of the results)")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    options = parser.parse_args(arguments)
    try:
        header, points = read_results(options.results)
        if options.table or options.update:
            for region, text in texts(header, points, options.suite).items():
                if options.table:
                    print(text)
                if options.update:
                    update(options.update, text, region)
            return 0
        folder = options.out or options.results[0].parent
        layers = [p for p in points if p["kind"] != "model"]
        for path in figures.draw(header, layers, folder, options.format):
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


def texts(header: dict, points: list[Point], suite: str) -> dict[str, str]:
    """Region of a README -> its table, for what the results hold: single layers, whole models.

    Raises:
        ResultsError: there are points of layers, but none of the suite.
    """
    layers = [p for p in points if p["kind"] != "model"]
    found = {LAYERS: markdown(header, layers, suite)} if layers else {}
    if len(layers) < len(points):
        found[MODELS] = models_markdown(header, points)
    return found


def markers(region: str) -> tuple[str, str]:
    """The comments around a generated region."""
    return f"<!-- {region}:start -->", f"<!-- {region}:end -->"


def update(path: Path, text: str, region: str) -> None:
    """Replace what stands between the markers of a region of a file, atomically.

    Raises:
        ResultsError: the file does not hold each marker exactly once, start before end.
    """
    old, (start, end) = path.read_text(encoding="utf-8"), markers(region)
    counts = old.count(start), old.count(end)
    if counts != (1, 1) or old.index(start) > old.index(end):
        raise ResultsError(
            f"plot: expected one {start} before one {end} in {path}, "
            f"got {counts[0]} and {counts[1]}" + (" in the wrong order" * (counts == (1, 1)))
        )
    before, rest = old.split(start)
    write_atomically(path, f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    sys.exit(main())
