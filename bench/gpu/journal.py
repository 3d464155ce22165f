"""Records that survive the process that writes them: what was begun, and what came of it.

A kernel that meets a card for the first time may kill its process or hang it. Every piece of work
is therefore announced before it starts: an announcement without a record tells what failed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from run import Writer


class Journal:
    """JSON lines by key, with the keys that were begun in a file beside them.

    Args:
        path: The results. A file that is there already is continued.
    """

    def __init__(self, path: Path):
        self.path = path
        self.begun = path.with_name(path.name + ".begun")
        self._writer = Writer(path)

    def records(self) -> list[dict]:
        """Every whole line; one that was torn by the end of its process is left out."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def done(self) -> set[str]:
        """Keys that need no more work."""
        return {r["key"] for r in self.records() if "key" in r}

    def start(self, key: str) -> None:
        """Announce work; on disk before this returns."""
        with open(self.begun, "a", encoding="utf-8") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, key: str, **record) -> None:
        """Keep what came of it."""
        self._writer.write({"key": key, **record})

    def note(self, **record) -> None:
        """Keep a record that belongs to no work: a header, say."""
        self._writer.write(record)

    def lost(self) -> list[str]:
        """Work that was begun and of which nothing came, in order."""
        lines = self.begun.read_text().splitlines() if self.begun.exists() else []
        done = self.done()
        return [key for key in dict.fromkeys(lines) if key not in done]

    def close_lost(self, **record) -> list[str]:
        """Write a record for everything lost; returns the keys."""
        keys = self.lost()
        for key in keys:
            self.finish(key, **record)
        self.begun.unlink(missing_ok=True)
        return keys

    def forget_lost(self) -> list[str]:
        """Take announcements back, so that the work is done by the next run; returns the keys."""
        keys = self.lost()
        self.begun.unlink(missing_ok=True)
        return keys
