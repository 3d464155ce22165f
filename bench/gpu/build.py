"""Builds both halves in place with the Python at hand: no network, nothing installed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TAIL = 3000


def build(seconds: float) -> dict[str, object]:
    """Build; without the CUDA half where that one fails.

    Returns:
        `seconds`, `said` (what setup.py chose), and `failed` with the end of the compiler's output
        if not all could be built.
    """
    start, record = time.monotonic(), {}
    for cuda in ("", "0"):
        left = max(30.0, seconds - (time.monotonic() - start))
        code, output = _setup(cuda, left)
        lines = [line for line in output.splitlines() if line.startswith("sparsekern:")]
        record["said"] = lines[-1] if lines else ""
        if code == 0:
            break
        what = "the CPU half alone" if cuda else "both halves"
        errors = [line for line in output.splitlines() if "error" in line.lower()]
        text = "\n".join(errors[:12]) + "\n...\n" + output[-TAIL:]
        record["failed"] = f"{record.get('failed', '')}{what}: exit code {code}: {text}\n"
    record["seconds"] = time.monotonic() - start
    return record


def _setup(cuda: str, seconds: float) -> tuple[int | str, str]:
    try:
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, timeout=seconds,
            env={**os.environ, "SPARSEKERN_CUDA": cuda}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return f"none after {seconds:.0f} s", text
    return done.returncode, done.stdout
