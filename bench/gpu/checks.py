"""Runs the tests marked `gpu`, each known by name whatever happens to its process."""

from __future__ import annotations

import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu.journal import Journal
from gpu.supervise import Outcome, supervise

ROOT = Path(__file__).parents[2]
OPTIONS = ("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"))
# They share the GPU: compiling kernels is what takes the time, by far.
PROCESSES = max(1, min(8, (os.cpu_count() or 1) // 2))
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
    gather(journal)  # what a run left that was killed
    with ThreadPoolExecutor(PROCESSES) as pool:
        outcomes = list(pool.map(lambda i: _share(journal, i, seconds), range(PROCESSES)))
    gather(journal)
    return Outcome(
        lost=[key for o in outcomes for key in o.lost],
        unfinished=[key for o in outcomes for key in o.unfinished],
        trouble="; ".join(dict.fromkeys(o.trouble for o in outcomes if o.trouble)),
        seconds=max(o.seconds for o in outcomes),
    )


def _share(journal: Journal, number: int, seconds: float) -> Outcome:
    """One process' share of the tests, into a journal of its own beside the other."""
    part = Journal(journal.path.with_name(f"{journal.path.name}.{number}"))
    environment = {
        **os.environ,
        "SPARSEKERN_JOURNAL": str(part.path),
        "SPARSEKERN_DONE": str(journal.path),
        "SPARSEKERN_SHARE": f"{number}/{PROCESSES}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench")]),
    }
    command = [
        *(sys.executable, "-m", "pytest", "-m", "gpu", "-p", "gpu.pytest_journal"),
        *("-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors"),
        *OPTIONS,
        *files(),
    ]
    return supervise(command, part, {"type": "test", "outcome": "died"}, seconds, STALL_S,
                     NORMAL, HOPELESS, environment)  # fmt: skip


def gather(journal: Journal) -> None:
    """Move what the shares hold into the journal."""
    for path in sorted(journal.path.parent.glob(f"{journal.path.name}.*")):
        if not path.suffix[1:].isdigit():
            continue
        part = Journal(path)
        for record in part.records():
            journal.note(**record)
        part.forget_lost()
        path.unlink()
