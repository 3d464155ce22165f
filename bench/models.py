"""Whole models, dense against sparse: `python bench/models.py --model resnet50 --peers`.

Every side (dense torch, other engines, ours) takes turns in the same rounds. One JSON line per
point is written as soon as it is measured; bench/README.md explains the fields.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path

import peaks
import plot
import run
import tables
import torch
from baselines import first_line, time_all
from contestants import Contest, sides
from zoo import MODELS

from sparsekern.measure import speedup
from sparsekern.measure.table import percent, times

SUITE = "models"


def main(arguments: list[str] | None = None) -> int:
    """Measure the points asked for that the file does not have; returns the exit status."""
    options = parse_arguments(arguments)
    path = options.out or run.default_path([SUITE])
    head = run.header(options, {n: peaks.measure(n) for n in options.threads})
    todo = [point for point in grid(options) if key(*point) not in done(path, head)]
    writer, before, failed = run.Writer(path), torch.get_num_threads(), 0
    if todo:
        writer.write(head)
    start = time.monotonic()
    try:
        for number, (name, batch, sparsity, threads) in enumerate(todo):
            if options.minutes and time.monotonic() - start > 60 * options.minutes:
                print(f"time is up, {len(todo) - number} points left: run again with --out {path}",
                      file=sys.stderr)  # fmt: skip
                break
            torch.set_num_threads(threads)
            print(f"{number + 1}/{len(todo)}: {label(name, batch)}, {percent(sparsity)}, "
                  f"{threads} thread(s)", file=sys.stderr)  # fmt: skip
            try:
                point = measure(name, batch, sparsity, options)
            except ImportError as error:  # a model that needs a package; the others go on
                failed += 1
                print(f"  {name} left out: {first_line(error)}", file=sys.stderr)
                continue
            writer.write({**point, "threads": threads})
            print(f"  {line(point)}", file=sys.stderr)
    finally:
        torch.set_num_threads(before)
    return show(path, failed)


def show(path: Path, failed: int) -> int:
    """Print the table of all points of a file."""
    try:
        print(tables.models_markdown(*plot.read_results([path])))
    except tables.ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if failed else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; leaves with status 2 and one clear line on a bad value."""
    parser = argparse.ArgumentParser(prog="models", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL",
                        help=f"of {', '.join(MODELS)} (default all)")  # fmt: skip
    parser.add_argument("--sparsity", nargs="+", type=run.share_of_zeros, default=[0.8, 0.9])
    parser.add_argument("--batch", nargs="+", type=run.count, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=run.count, default=[1])
    parser.add_argument("--budget", type=run.duration, default=10.0,
                        help="seconds of timing per point, all sides together")  # fmt: skip
    parser.add_argument("--minutes", type=run.duration, help="start no point after so many minutes")
    run.add_peers(parser)
    parser.add_argument("--out", type=Path, help="JSONL file to go on with "
                        "(default bench/results/models-TIME.jsonl)")  # fmt: skip
    return run.with_all_peers(parser.parse_args(arguments))


def grid(options: argparse.Namespace):
    """Every (model, batch, sparsity, threads) asked for, one model after the other."""
    return product(options.model, options.batch, options.sparsity, options.threads)


def label(name: str, batch: int) -> str:
    """`resnet50 b8`."""
    return f"{name} b{batch}"


def key(name: str, batch: int, sparsity: float, threads: int) -> tuple:
    """What makes a point."""
    return label(name, batch), sparsity, threads


def done(path: Path, head: dict) -> set[tuple]:
    """Points of a file that need not be measured again: same commit, same CPU."""
    found, same = set(), False
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(text)
        except ValueError:
            continue  # torn by a kill
        if record["type"] == "header":
            same = record["commit"] == head["commit"] and record["hardware"] == head["hardware"]
        elif same:
            found.add((record["case"], record["sparsity"], record["threads"]))
    return found


@torch.inference_mode()
def measure(name: str, batch: int, sparsity: float, options: argparse.Namespace) -> dict:
    """Time all sides of a model against each other; see bench/README.md for the fields."""
    torch.compiler.reset()  # the compiled models of the point before hold its weights
    with torch.inference_mode(False):
        contest = Contest(MODELS[name], sparsity, batch)
        pruned = contest.pruned  # made outside of inference mode, as a user's model is
    with ExitStack() as stack:
        found, left_out = sides(contest, options.peers or [], stack, say=_progress)
        _progress("timing")
        timings = time_all(found, left_out, options.budget)
    rows = list(zip(found, timings))
    best = {
        role: min((r for r in rows if r[0].role == role), key=lambda r: r[1].median_ms)
        for role in ("dense", "ours")
    }
    return {
        "type": "point",
        "suite": SUITE,
        "case": label(name, batch),
        "kind": "model",
        "model": name,
        "batch": batch,
        "input_shape": list(contest.x.shape),
        "pattern": "unstructured",
        "sparsity": sparsity,
        "zeros": sum(int((p == 0).sum()) for p in pruned.parameters()),
        "parameters": sum(p.numel() for p in pruned.parameters()),
        "dtype": "float32",
        "sides": {side.name: run.summary(side, timing) for side, timing in rows},
        "left_out": left_out,
        "layers": contest.layers,
        "best_dense": best["dense"][0].name,
        "best_ours": best["ours"][0].name,
        "speedup": asdict(speedup(best["dense"][1], best["ours"][1])),
        "max_rel_error": max(side.error for side in found if side.role == "ours"),
    }


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K  {text}", end="\r", file=sys.stderr, flush=True)


def line(point: dict) -> str:
    """A point in one line."""
    sides = {name: f"{side['median_ms']:.3g}" for name, side in point["sides"].items()}
    text = ", ".join(f"{name} {ms}" for name, ms in sides.items())
    missing = "".join(f"\n  {name} left out: {why}" for name, why in point["left_out"].items())
    gain = point["speedup"]
    return f"{text} ms: {times(gain['median'])} ({gain['p10']:.2f} to {gain['p90']:.2f}){missing}"


if __name__ == "__main__":
    sys.exit(main())
