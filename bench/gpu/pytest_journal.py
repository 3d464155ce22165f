"""A pytest plugin: every test into the journal named by SPARSEKERN_JOURNAL, those done left out.

SPARSEKERN_DONE names another journal of tests that are done, SPARSEKERN_SHARE which part of the
others this process does: `0/8` the first of eight.

Work that loses the GPU (an illegal instruction, an access out of bounds) leaves a context in which
every later call fails. The process then ends after the test that did it, and the rest runs in the
next one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu.journal import Journal
from gpu.machine import LOST, context_error

HEAD_LINES = 12


class Recorder:
    """Writes what pytest reports."""

    def __init__(self, journal: Journal, others: Journal, share: str):
        self.journal, self.others = journal, others
        self.number, self.shares = map(int, share.split("/"))
        self.reports = []

    def done(self) -> set[str]:
        """Keys that need no more work."""
        return self.journal.done() | self.others.done()

    @pytest.hookimpl(trylast=True)  # after the choice by marks
    def pytest_collection_modifyitems(self, config, items):
        """Leave out what an earlier process has done."""
        done = self.done()
        self.journal.note(type="collected", tests=[key_of(item.nodeid) for item in items])
        mine = items[self.number :: self.shares]
        mine = [item for item in mine if key_of(item.nodeid) not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine

    def pytest_collectreport(self, report):
        """A file that cannot be imported, for a missing package say, is a record as well."""
        if report.failed and not self.number and key_of(report.nodeid) not in self.done():
            why = [line[1:].strip() for line in report.longreprtext.splitlines() if line[:1] == "E"]
            self.journal.finish(
                key_of(report.nodeid), type="test", outcome="not collected", failed="; ".join(why)
            )

    def pytest_runtest_logstart(self, nodeid, location):
        """Announce the test."""
        self.reports = []
        self.journal.start(key_of(nodeid))

    def pytest_runtest_logreport(self, report):
        """Record the test once its last phase is over."""
        self.reports.append(report)
        if report.when != "teardown":
            return
        outcome, head = summary(self.reports)
        gone = context_error()
        if gone:
            outcome, head = "failed", f"the GPU was lost: {gone}; {head}"
        seconds = sum(r.duration for r in self.reports)
        record = {"type": "test", "outcome": outcome, "seconds": seconds}
        if head:
            record["failed" if outcome == "failed" else "reason"] = head
        self.journal.finish(key_of(report.nodeid), **record)
        if gone:
            os._exit(LOST)


def key_of(nodeid: str) -> str:
    """Key of a test in the journal."""
    return f"test {nodeid}"


def summary(reports) -> tuple[str, str]:
    """Outcome of a test, and the head of what it says when it failed or was skipped."""
    for report in reports:
        if report.failed:
            lines = report.longreprtext.splitlines()
            errors = [line for line in lines if line.startswith("E")] or lines
            return "failed", "\n".join([*errors[:HEAD_LINES], *lines[-1:]])
        if report.skipped:
            return "skipped", str(report.longrepr[-1] if report.longrepr else "")
    return "passed", ""


def pytest_configure(config):
    """Start recording."""
    journals = (Journal(Path(os.environ[f"SPARSEKERN_{name}"])) for name in ("JOURNAL", "DONE"))
    config.pluginmanager.register(Recorder(*journals, os.environ["SPARSEKERN_SHARE"]))
