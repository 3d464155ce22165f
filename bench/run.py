"""Runs benchmark suites: `python bench/run.py --suite summary --threads 1 2`.

Every side of a point (dense baselines, peers, ours) is timed in the same rounds. One JSON line per
point is written as soon as it is measured; bench/README.md explains the fields.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

import baselines
import cases
import peaks
import torch
from peers.client import ENGINES

import sparsekern
from sparsekern.measure import Timing, hardware, speedup
from sparsekern.measure import commit as checkout
from sparsekern.measure.table import MISSING, percent, times
from sparsekern.patterns import parse

FOLDER = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INDEX_BYTES = 4  # a column of csr
COLUMNS = (
    "case", "pattern", "sparsity", "dtype", "threads", "best dense", "dense ms", "ours ms",
    "speed-up", "p10 to p90", "of FMA peak", "of L1 limit", "error",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure the points asked for and write them; returns the exit status."""
    options = parse_arguments(arguments)
    points = list(grid(options))
    if not points:
        print("bench: expected at least one point, got none that fits the filters", file=sys.stderr)
        return 2
    path = options.out or default_path(options.suite)
    limits = {n: peaks.measure(n) for n in options.threads}
    writer = Writer(path)
    writer.write(header(options, limits))
    before = torch.get_num_threads()
    try:
        with Display(len(points)) as display:
            for suite, case, pattern, sparsity, dtype, threads in points:
                display.start(case.name, pattern, sparsity)
                torch.set_num_threads(threads)
                problem = cases.build(case, pattern, sparsity, DTYPES[dtype])
                point = measure(problem, options, limits[threads])
                point = {"type": "point", "suite": suite, **point, "threads": threads}
                writer.write(point)
                display.add(point)
    finally:
        torch.set_num_threads(before)
    print(f"{len(points)} points written to {path}", file=sys.stderr)
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; leaves with status 2 and one clear line on a bad value."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    names = [*cases.SUITES, "all"]
    parser.add_argument("--suite", nargs="+", default=["summary"], choices=names, metavar="SUITE",
                        help=f"one or more of {', '.join(names)} (default summary)")  # fmt: skip
    parser.add_argument("--case", help="only cases whose name contains this text")
    parser.add_argument("--pattern", nargs="+", type=_pattern, help="only these patterns")
    parser.add_argument("--sparsity", nargs="+", type=share_of_zeros,
                        help="these shares of zeros instead of the suite's own")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--threads", nargs="+", type=count, default=[1])
    parser.add_argument("--budget", type=duration, default=0.5,
                        help="seconds of timing per point, all sides together")  # fmt: skip
    add_peers(parser)
    parser.add_argument("--int8", action="store_true",
                        help="time linear layers in int8, too: ours and torch's dense")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSONL file to append to "
                        "(default bench/results/SUITE-TIME.jsonl)")  # fmt: skip
    return with_all_peers(parser.parse_args(arguments))


def add_peers(parser: argparse.ArgumentParser) -> None:
    """The option `--peers`."""
    parser.add_argument("--peers", nargs="*", choices=ENGINES, metavar="ENGINE",
                        help="time peers as well: of single layers torch.sparse and scipy, and the "
                        f"engines named (without names all of {', '.join(ENGINES)}); "
                        "bench/peers/install.py installs them")  # fmt: skip


def with_all_peers(options: argparse.Namespace) -> argparse.Namespace:
    """`--peers` without names means all of them."""
    options.peers = list(ENGINES) if options.peers == [] else options.peers
    return options


def _pattern(text: str) -> str:
    try:
        return str(parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number(text: str, kind: type, wanted: str, fits) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}")
    return value


def share_of_zeros(text: str) -> float:
    """Of the command line, in [0, 1)."""
    return _number(text, float, "a share of zeros in [0, 1)", lambda v: 0 <= v < 1)


def count(text: str) -> int:
    """Of the command line, at least 1."""
    return _number(text, int, "a whole number of at least 1", lambda v: v >= 1)


def duration(text: str) -> float:
    """Of the command line, above 0."""
    return _number(text, float, "a time above 0", lambda v: 0 < v < float("inf"))


def grid(options: argparse.Namespace) -> Iterator[tuple]:
    """Every (suite, case, pattern, sparsity, dtype, threads) asked for."""
    suites = cases.SUITES if "all" in options.suite else dict.fromkeys(options.suite)
    for suite, dtype, threads in product(suites, options.dtype, options.threads):
        for case, pattern, sparsity in cases.SUITES[suite].points(
            options.pattern, options.sparsity
        ):
            if options.case is None or options.case in case.name:
                yield suite, case, pattern, sparsity, dtype, threads


def default_path(suites: list[str]) -> Path:
    """bench/results/SUITE-TIME.jsonl, so that runs of different days and machines never mix."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return FOLDER / "results" / f"{'-'.join(suites)}-{stamp}.jsonl"


def header(options: argparse.Namespace, limits: dict[int, dict]) -> dict[str, object]:
    """What the points were measured on, and how."""
    return {
        "type": "header",
        "format": "sparsekern bench points",
        "version": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "sparsekern": sparsekern.__version__,
        "isa": sparsekern.cpu_isa(),
        "hardware": {k: v for k, v in hardware().items() if k != "threads"},  # a point has its own
        "peaks": {str(threads): found for threads, found in limits.items()},
        "budget_s": options.budget,
    }


def commit() -> str | None:
    """Commit of this checkout, see `sparsekern.measure.commit`."""
    return checkout(FOLDER)


def measure(problem: cases.Problem, options: argparse.Namespace, limits: dict) -> dict:
    """Time all sides of a problem against each other; see bench/README.md for the fields.

    `peers` None adds no peer, else those of torch and scipy and the engines named.
    """
    case, peers = problem.case, options.peers
    with nullcontext() if case.training else torch.inference_mode(), ExitStack() as stack:
        sides, left_out = baselines.sides(problem, peers is not None, options.int8)
        engines, missing = baselines.engine_sides(problem, peers or (), stack)
        sides, left_out = [*sides[:-1], *engines, sides[-1]], {**left_out, **missing}
        timings = baselines.time_all(sides, left_out, options.budget)
    rows = list(zip(sides, timings))
    ours = timings[-1]
    best, best_timing = min((r for r in rows if r[0].role == "dense"), key=lambda r: r[1].median_ms)
    return {
        "case": case.name,
        "kind": case.kind,
        "training": case.training,
        "shape": list(case.weight_shape),
        "input_shape": list(case.input_shape),
        "tokens": case.tokens,
        "pattern": problem.pattern,
        "sparsity": problem.sparsity,
        "nnz": problem.nnz,
        "dtype": str(problem.x.dtype).removeprefix("torch."),
        "sides": {side.name: summary(side, timing) for side, timing in rows},
        "left_out": left_out,
        "best_dense": best.name,
        "speedup": asdict(speedup(best_timing, ours)),
        "max_rel_error": sides[-1].error,
        **rates(problem, ours, limits),
    }


def summary(side: baselines.Side, timing: Timing) -> dict[str, object]:
    """One side of a point, as it is written."""
    keys = ("median_ms", "p10_ms", "p90_ms", "min_ms", "rounds", "calls")
    times = {key: getattr(timing, key) for key in keys}
    version = {"version": side.version} if side.version else {}
    return {"role": side.role, **times, "max_rel_error": side.error, **version}


def rates(problem: cases.Problem, ours: Timing, limits: dict) -> dict[str, float | None]:
    """Our side's rates, and their share of what the machine can do (None where unknown)."""
    per_s = 1e3 / ours.median_ms / 1e9
    real = problem.flops(problem.nnz) * per_s
    stored = problem.nnz * (problem.x.element_size() + INDEX_BYTES) * per_s

    def share(value: float, limit: str) -> float | None:
        return round(100 * value / limits[limit], 2) if limit in limits else None

    return {
        "real_gflops": real,
        "effective_gflops": problem.flops(problem.mask.numel()) * per_s,
        "percent_fma_peak": share(real, "fma_gflops"),
        "percent_l1_limit": share(real, "fma_l1_gflops"),
        "weight_gb_s": stored,
        "percent_memory_bandwidth": share(stored, "load_memory_gb_s"),
    }


class Writer:
    """Appends whole JSON lines, each on disk before the next point is measured."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run killed in the middle of a line must not swallow the first line of this one.
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._start = "\n" if torn else ""

    def write(self, record: dict) -> None:
        """Add one record."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(self._start + json.dumps(tidy(record), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._start = ""


def tidy(value):
    """The same record with six significant digits: more would be noise in a committed file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: tidy(v) for key, v in value.items()}
    return [tidy(v) for v in value] if isinstance(value, (list, tuple)) else value


class Display:
    """A live table in a terminal; elsewhere one line per point."""

    def __init__(self, total: int):
        from rich.console import Console
        from rich.live import Live

        self.total, self.rows, self.status = total, [], ""
        self.console = Console(stderr=True)
        # Drawn between points only: a thread that draws meanwhile would disturb the timing.
        self.live = Live(get_renderable=self._recent, console=self.console, auto_refresh=False)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live.start()
        else:
            print("  ".join(COLUMNS), file=sys.stderr)
        return self

    def __exit__(self, *error) -> None:
        if self.console.is_terminal:
            self.live.stop()
            self.console.print(self._table(self.rows))

    def start(self, case: str, pattern: str, sparsity: float) -> None:
        """Say what is being measured."""
        self.status = f"{len(self.rows)}/{self.total}: {case}, {pattern} {percent(sparsity)}"
        if self.console.is_terminal:
            self.live.refresh()

    def add(self, point: dict) -> None:
        """Show a finished point."""
        self.rows.append(text_row(point))
        if not self.console.is_terminal:
            print("  ".join(self.rows[-1]), file=sys.stderr, flush=True)

    def _recent(self):
        room = max(1, self.console.height - 6)
        return self._table(self.rows[-room:], self.status)

    def _table(self, rows: list[tuple[str, ...]], status: str = ""):
        from rich import box
        from rich.table import Table

        table = Table(*COLUMNS, box=box.SIMPLE_HEAD, caption=status, caption_justify="left")
        table.columns[0].no_wrap = True
        for row in rows:
            style = "red" if row[COLUMNS.index("speed-up")].startswith("0.") else None
            table.add_row(*row, style=style)
        return table


def text_row(point: dict) -> tuple[str, ...]:
    """A point as the cells of the table."""
    gain, sides = point["speedup"], point["sides"]
    dense, ours = sides[point["best_dense"]], sides[baselines.OURS]

    def of_limit(value: float | None) -> str:
        return MISSING if value is None else f"{value:.0f} %"

    spread = f"{gain['p10']:.2f} to {gain['p90']:.2f}"
    return (
        point["case"], point["pattern"], percent(point["sparsity"]), point["dtype"],
        str(point["threads"]), point["best_dense"], f"{dense['median_ms']:.3g}",
        f"{ours['median_ms']:.3g}", times(gain["median"]), spread,
        of_limit(point["percent_fma_peak"]), of_limit(point["percent_l1_limit"]),
        f"{point['max_rel_error']:.0e}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
