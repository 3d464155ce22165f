"""Runs a target in processes that may crash or hang, and counts what came."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

TARGETS = ("calls", "files", "plans")
HANG = 120  # seconds for one case, with room for a busy machine and a sanitizer
_TESTS = Path(__file__).resolve().parents[1]


@dataclass
class Outcome:
    """Cases that ran, and findings: (case, what it was, what went wrong)."""

    cases: int = 0
    findings: list[tuple[int, str, str]] = field(default_factory=list)


def _start(target, seed, first, end, until):
    paths = [str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    arguments = [target, *map(str, (seed, first, end, until))]
    command = [sys.executable, "-X", "faulthandler", "-m", "fuzz.worker", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def _lines(stream) -> queue.Queue:
    """The lines of a pipe, then None."""
    lines = queue.Queue()

    def read():
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _follow(process, outcome: Outcome, first: int) -> int:
    """Read what a worker notes until it ends; returns the case after its last."""
    lines, errors, last = _lines(process.stdout), _lines(process.stderr), first - 1
    while True:
        try:
            line = lines.get(timeout=HANG)
        except queue.Empty:
            process.kill()
            outcome.findings.append((last, "", f"no end in {HANG} s"))
            return last + 1
        if line is None:
            break
        note = json.loads(line)
        if "fault" in note:
            outcome.findings.append((note["case"], note["label"], note["fault"]))
        elif "case" in note:
            last, outcome.cases = note["case"], outcome.cases + 1
    if process.wait() != 0:
        words = "".join(iter(errors.get, None))[-1500:]
        outcome.findings.append((last, "", f"ended with {process.returncode}: {words}"))
    return last + 1


def campaign(target: str, seed: int, cases: int, seconds: float = 1e9, first: int = 0) -> Outcome:
    """Run cases [first, first + cases) of a target, as far as the time allows."""
    outcome, until, end = Outcome(), time.monotonic() + seconds, first + cases
    while first < end and time.monotonic() < until:
        process = _start(target, seed, first, end, until)
        after = _follow(process, outcome, first)
        if after == first:  # it died before its first case
            break
        first = after
    return outcome
