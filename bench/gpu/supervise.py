"""Runs a process that may die or hang, and starts it again behind the work that killed it."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpu.journal import Journal

POLL_S = 0.1
KILL_S = 30.0  # a process inside the driver takes its time to die
TAIL = 1500  # characters of output that are kept of a process that failed


@dataclass
class Outcome:
    """How the work of one command ended.

    Attributes:
        lost: Keys of work that killed its process or hung.
        unfinished: Keys of work that was under way when time was up; the next run does them.
        trouble: What else went wrong, an empty string if nothing did.
        seconds: How long it took.
    """

    lost: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    trouble: str = ""
    seconds: float = 0.0


def supervise(
    command: Sequence[str],
    journal: Journal,
    kind: dict,
    seconds: float,
    stall_s: float,
    normal: Sequence[int] = (0,),
    hopeless: Sequence[int] = (),
    env: dict[str, str] | None = None,
) -> Outcome:
    """Run a command that does work by a journal until it has ended normally.

    Args:
        command: The process; it skips the keys that the journal has done.
        journal: Where it announces and records work.
        kind: Fields of the record that is written for work which killed its process.
        seconds: For all its starts together; then it is killed.
        stall_s: A process that neither begins nor finishes work for so long hangs, and is killed.
        normal: Exit codes of a process that has done what it could.
        hopeless: Exit codes of a process that is itself broken: no work is to blame.
        env: Its environment.

    Returns:
        What happened.
    """
    outcome, start = Outcome(), time.monotonic()
    journal.forget_lost()
    while True:
        left = start + seconds - time.monotonic()
        known = len(journal.done())
        try:
            code, why, output = _once(command, journal, left, stall_s, env)
        except subprocess.TimeoutExpired:
            outcome.lost += journal.close_lost(**kind, failed="it hung and cannot be killed")
            outcome.trouble = "a process hangs inside the driver: the GPU needs help from outside"
            break
        if why == "time":
            outcome.unfinished += journal.forget_lost()
            outcome.trouble = f"stopped after {seconds:.0f} s"
            break
        if code in normal:
            journal.forget_lost()
            break
        if code in hopeless and not why:
            journal.forget_lost()
            outcome.trouble = f"{command[:4]} ended with {_name(code)}: {output[-TAIL:]}"
            break
        reason = "it hung" if why == "stall" else f"its process ended with {_name(code)}"
        lost = journal.close_lost(**kind, failed=f"{reason}: {_last_line(output)}")
        outcome.lost += lost
        if len(journal.done()) == known:  # it would end the same way again
            outcome.trouble = f"{command[:4]} ended with {_name(code)}: {output[-TAIL:]}"
            break
    outcome.seconds = time.monotonic() - start
    return outcome


def _once(command, journal: Journal, seconds: float, stall_s: float, env):
    """One start: exit code, why it was killed (`time`, `stall` or nothing), and its output."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        # A group of its own, to end it with the compilers it has started.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, preexec_fn=os.setpgrp
        )
        try:
            why = _watch(process, journal, time.monotonic() + seconds, stall_s)
        finally:  # when time is up, and when this process is interrupted
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(KILL_S)
        log.seek(0)
        return process.returncode, why, log.read()


def _watch(process, journal: Journal, end: float, stall_s: float) -> str:
    """Wait for a process; why it must be ended, or an empty string if it has ended by itself."""
    seen, moved = None, time.monotonic()
    while process.poll() is None:
        time.sleep(POLL_S)
        now = time.monotonic()
        state = [p.stat().st_size for p in (journal.begun, journal.path) if p.exists()]
        if state != seen:
            seen, moved = state, now
        if now > end:
            return "time"
        if now - moved > stall_s:
            return "stall"
    return ""


def _name(code: int) -> str:
    if code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
