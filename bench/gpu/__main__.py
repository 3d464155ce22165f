"""`make gpu`: build both halves, run the tests marked `gpu`, then the sweeps; a short table last.

    python -m gpu                            # everything, inside nine minutes
    python -m gpu --suite block decode       # only these; `tests` is one of them
    python -m gpu --minutes 25 --out FOLDER  # longer, and where the results go

Run again with the same sources it goes on where it stopped. Whatever fails is named at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from run import commit

from gpu import build, checks, machine, table
from gpu.journal import Journal
from gpu.suites import SUITES
from gpu.supervise import supervise

RESULTS = Path(__file__).parents[1] / "results"
TESTS = "tests"
MINUTES = 8.5
BUILD_S = 200.0
TESTS_S = 170.0
STALL_S = 100.0  # of a point: Triton tries its configurations, cuSPARSELt its algorithms
RESERVE_S = 10.0  # for the table


def main(arguments: list[str] | None = None) -> int:
    """Everything asked for; 0 if nothing failed."""
    start = time.monotonic()
    options = parse_arguments(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print("make gpu: expected a CUDA device, got none that torch can see", file=sys.stderr)
        return 2
    end = start + 60 * options.minutes
    built = build.build(BUILD_S) if not options.no_build else {"said": "not built", "seconds": 0.0}
    _say(f"built in {built['seconds']:.0f} s; {built['said']}")
    journal = Journal(options.out)
    journal.note(**header(options), build=built)
    if TESTS in options.suite:
        share = TESTS_S if len(options.suite) > 1 else end - time.monotonic()
        _tell(TESTS, checks.run(journal, min(share, end - time.monotonic())), journal)
    suites = [name for name in options.suite if name != TESTS]
    for i, name in enumerate(suites):
        left = end - time.monotonic() - RESERVE_S
        if left <= 0:
            break
        shares = [SUITES[other][1] for other in suites[i:]]
        _tell(name, sweep(name, journal, left * shares[0] / sum(shares), left, options), journal)
    records = journal.records()
    print(table.report(_latest(records), suites))
    print(f"{time.monotonic() - start:.0f} s; all results: {journal.path}")
    return 1 if any("failed" in r for r in records) or built.get("failed") else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    names = [TESTS, *SUITES]
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", nargs="*", choices=names, metavar="SUITE",
                        help=f"of {', '.join(names)}; all without names")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder or .jsonl file")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--budget", type=float, default=0.4, help="seconds of timing per point")
    parser.add_argument("--no-build", action="store_true", help="take what is built")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    options = parser.parse_args(arguments)
    options.suite = options.suite or names
    if options.out.suffix != ".jsonl":
        card = "cpu"
        if options.device.type == "cuda" and torch.cuda.is_available():
            card = torch.cuda.get_device_name(options.device).lower().replace(" ", "-")
        options.out = options.out / f"gpu-{card}-{machine.fingerprint()}.jsonl"
    return options


def header(options: argparse.Namespace) -> dict[str, object]:
    """The first record of a run."""
    return {
        "type": "header", "format": "sparsekern gpu points", "version": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(), "sources": machine.fingerprint(), "suites": options.suite,
        "budget_s": options.budget, **machine.header(options.device),
    }  # fmt: skip


def sweep(name: str, journal: Journal, seconds: float, left: float, options):
    """One suite in a process of its own, which ends by itself once its time is up."""
    command = [
        *(sys.executable, "-m", "gpu.sweep", "--suite", name, "--seconds", f"{seconds:.0f}"),
        *("--budget", str(options.budget), "--out", str(journal.path)),
        *("--device", str(options.device)),
    ]
    kind = {"type": "point", "suite": name}
    # The last point may run over; it is not worth losing.
    return supervise(command, journal, kind, min(left, seconds + 30), STALL_S)


def _tell(name: str, outcome, journal: Journal) -> None:
    """A line about what has ended, and a record if something went wrong beside the work itself."""
    _say(f"{name}: {outcome.seconds:.0f} s {'; '.join(outcome.lost)} {outcome.trouble}")
    if outcome.trouble and not outcome.trouble.startswith("stopped"):
        journal.note(type="trouble", suite=name, failed=outcome.trouble)


def _latest(records: list[dict]) -> list[dict]:
    """Without what earlier runs into the same file had trouble with."""
    last = max(i for i, r in enumerate(records) if r.get("type") == "header")
    return [r for i, r in enumerate(records) if "key" in r or i >= last]


def _say(text: str) -> None:
    print(text.strip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
