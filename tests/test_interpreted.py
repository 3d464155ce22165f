"""Runs the files of `tests/interpreted` with Triton's interpreter, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_kernels_on_the_interpreter(name):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(FOLDER / name), "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        timeout=570,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_interpreter_is_kept_out_of_this_process():
    """Compiled and interpreted kernels do not mix: `compile_for` would fail."""
    assert os.environ.get("TRITON_INTERPRET") != "1"
