"""The processes of `make gpu`: what dies or hangs is known by name, and all the rest is done."""

import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from gpu import checks, table
from gpu.journal import Journal
from gpu.machine import context_error
from gpu.supervise import supervise

BENCH = Path(__file__).parents[1] / "bench"
PATHS = os.pathsep.join([str(BENCH.parent), str(BENCH)])


def test_journal_knows_what_was_lost(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.records() == [] and journal.lost() == []
    for key in ("a", "b", "c"):
        journal.start(key)
    journal.finish("b", gain=2.0)
    assert journal.done() == {"b"} and journal.lost() == ["a", "c"]
    assert Journal(journal.path).close_lost(type="point", failed="died") == ["a", "c"]
    assert journal.done() == {"a", "b", "c"} and not journal.begun.exists()
    journal.start("d")
    assert journal.forget_lost() == ["d"] and "d" not in journal.done()


def test_journal_survives_a_torn_line(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b", "gai')
    journal = Journal(path)
    journal.finish("c")
    assert journal.done() == {"a", "c"}


WORKER = """
import os, signal, sys, time
from pathlib import Path
from gpu.journal import Journal

journal = Journal(Path(sys.argv[1]))
for key in ("one", "dies", "two", "hangs", "three"):
    if key in journal.done():
        continue
    journal.start(key)
    if key == "dies":
        print("an illegal instruction", flush=True)
        os.kill(os.getpid(), signal.SIGILL)
    if key == "hangs":
        time.sleep(1000)
    journal.finish(key, fine=True)
"""


def watched(tmp_path, code, seconds=60.0, stall_s=4.0, **options):
    journal = Journal(tmp_path / "j.jsonl")
    command = [sys.executable, "-c", code, str(journal.path)]
    environment = {**os.environ, "PYTHONPATH": PATHS}
    kind = {"type": "point"}
    outcome = supervise(command, journal, kind, seconds, stall_s, env=environment, **options)
    return outcome, {r["key"]: r for r in journal.records()}


def test_work_behind_one_that_dies_or_hangs_is_done(tmp_path):
    light = WORKER.replace("from gpu.journal import Journal", LIGHT_JOURNAL)
    outcome, records = watched(tmp_path, light)
    assert outcome.lost == ["dies", "hangs"] and not outcome.trouble
    assert [key for key, r in records.items() if r.get("fine")] == ["one", "two", "three"]
    assert records["dies"]["failed"] == "its process ended with SIGILL: an illegal instruction"
    assert records["hangs"]["failed"].startswith("it hung") and records["dies"]["type"] == "point"


# As `Journal` does it; importing that brings torch, which would take longer than all the rest.
LIGHT_JOURNAL = """
import json

class Journal:
    def __init__(self, path):
        self.path, self.begun = path, path.with_name(path.name + ".begun")
    def done(self):
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {json.loads(line)["key"] for line in lines}
    def start(self, key):
        with open(self.begun, "a") as file:
            file.write(key + chr(10))
    def finish(self, key, **record):
        with open(self.path, "a") as file:
            file.write(json.dumps({"key": key, **record}) + chr(10))
"""


def test_a_process_that_never_gets_anywhere_is_not_started_again(tmp_path):
    outcome, records = watched(tmp_path, "raise SystemExit('no module named x')")
    assert "no module named x" in outcome.trouble and "exit code 1" in outcome.trouble
    assert records == {}


def test_a_broken_harness_blames_no_work(tmp_path):
    code = "import sys; open(sys.argv[1] + '.begun', 'w').write('k\\n'); sys.exit(3)"
    outcome, records = watched(tmp_path, code, hopeless=(3,))
    assert "exit code 3" in outcome.trouble and records == {} and outcome.lost == []


def test_time_that_is_up_leaves_work_for_the_next_run(tmp_path):
    code = "import sys, time; open(sys.argv[1] + '.begun', 'w').write('k\\n'); time.sleep(1000)"
    outcome, records = watched(tmp_path, code, seconds=1.0, stall_s=60.0)
    assert outcome.unfinished == ["k"] and outcome.trouble == "stopped after 1 s"
    assert records == {} and not (tmp_path / "j.jsonl.begun").exists()


# The tests for a GPU, as a plugin records them

SUITE = """
import pytest
pytestmark = pytest.mark.gpu

def test_good(): pass

def test_bad():
    assert 1 == 2, "numbers differ"

@pytest.mark.skip(reason="no second GPU")
def test_skipped(): pass

def test_lost(monkeypatch):
    from gpu import pytest_journal
    pytest_journal.context_error = lambda: "CUDA error: an illegal instruction"

def test_behind(): pass
"""


@pytest.mark.parametrize("processes", [1, 3])
def test_every_test_is_recorded_whatever_happens_to_its_process(processes, tmp_path, monkeypatch):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_card.py").write_text(SUITE)
    (folder / "test_package.py").write_text("import no_such_package  # pytest.mark.gpu\n")
    (folder / "test_other.py").write_text("def test_cpu(): pass\n")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    found = checks.files(folder)
    assert [Path(f).name for f in found] == ["test_card.py", "test_package.py"]
    monkeypatch.setattr(checks, "files", lambda: found)
    monkeypatch.setattr(checks, "ROOT", BENCH.parent)
    monkeypatch.setattr(checks, "PROCESSES", processes)
    monkeypatch.setattr(checks, "OPTIONS", ("-c", str(folder / "pytest.ini")))
    journal = Journal(tmp_path / "j.jsonl")
    outcome = checks.run(journal, 120.0)
    assert not outcome.trouble and not outcome.lost, outcome
    records = journal.records()
    got = {re.split("::|/| ", r["key"])[-1]: r for r in records if "key" in r}
    said = table.report(records, [])
    assert "tests: 2 passed, 2 failed, 1 not collected, 1 skipped" in said
    assert "skipped 1 tests: " in said and "no second GPU" in said and "not reached" not in said
    some = [r for r in records if "test_behind" not in r.get("key", "")]
    assert "1 not reached in time" in table.report(some, [])
    assert {name: r["outcome"] for name, r in got.items()} == {
        "test_package.py": "not collected", "test_good": "passed", "test_bad": "failed",
        "test_skipped": "skipped", "test_lost": "failed", "test_behind": "passed",
    }  # fmt: skip
    assert "numbers differ" in got["test_bad"]["failed"]
    assert "No module named 'no_such_package'" in got["test_package.py"]["failed"]
    assert got["test_skipped"]["reason"].endswith("no second GPU")
    assert got["test_lost"]["failed"].startswith("the GPU was lost: CUDA error: an illegal")
    assert [path.name for path in tmp_path.glob("j.jsonl*")] == ["j.jsonl"]
    checks.run(journal, 120.0)  # nothing is done twice
    keys = [r["key"] for r in journal.records() if "key" in r]
    assert len(keys) == len(set(keys)) == len(got)


def test_what_a_killed_run_left_is_gathered(tmp_path):
    journal, part = Journal(tmp_path / "j.jsonl"), Journal(tmp_path / "j.jsonl.5")
    journal.finish("a", type="test", outcome="passed")
    part.finish("b", type="test", outcome="passed")
    part.start("c")
    checks.gather(journal)
    assert journal.done() == {"a", "b"}
    assert [path.name for path in tmp_path.iterdir()] == ["j.jsonl"]


def test_without_pytest_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    outcome = checks.run(Journal(tmp_path / "j.jsonl"), 1.0)
    assert outcome.trouble == "pytest is not installed: no test was run"


def test_no_cuda_context_is_no_error():
    assert context_error() == ""
