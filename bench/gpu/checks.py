"""Runs the tests marked `gpu`, each known by name whatever happens to its process."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from gpu.journal import Journal
from gpu.supervise import Outcome, supervise

ROOT = Path(__file__).parents[2]
OPTIONS = ("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"))
STALL_S = 90.0  # a first launch compiles and tunes; no single test takes longer
HOPELESS = (2, 3, 4)  # interrupted, an error inside pytest or our plugin, a bad command line
NORMAL = (0, 1, 5)  # of pytest: passed, failed or not collected, nothing left to do


def files(folder: Path = ROOT / "tests") -> list[str]:
    """Test files with tests for a GPU; the others would only cost their imports."""
    found = sorted(folder.glob("**/test_*.py"))
    return [str(path) for path in found if "pytest.mark.gpu" in path.read_text()]


def run(journal: Journal, seconds: float) -> Outcome:
    """Run them, for at most some seconds."""
    if importlib.util.find_spec("pytest") is None:
        return Outcome(trouble="pytest is not installed: no test was run")
    environment = {
        **os.environ,
        "SPARSEKERN_JOURNAL": str(journal.path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench")]),
    }
    command = [
        *(sys.executable, "-m", "pytest", "-m", "gpu", "-p", "gpu.pytest_journal"),
        *("-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors"),
        *OPTIONS,
        *files(),
    ]
    return supervise(command, journal, {"type": "test", "outcome": "died"}, seconds, STALL_S,
                     NORMAL, HOPELESS, environment)  # fmt: skip
