"""Timings kept on disk, so that the next conversion is quick. The file is never trusted."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import tempfile
import time
import warnings
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: writers are not kept apart, the last one wins
    fcntl = None

VERSION = 2
MAX_BYTES = 64 << 20  # a file beyond this is none of ours
LOCK_WAIT_S = 2.0
_TEMPORARY = "tuning-*.tmp"


class _NoFile(OSError):
    """Something that is no regular file where the cache should be."""


def cache_folder() -> Path | None:
    """The user's cache folder: $XDG_CACHE_HOME/sparsekern or ~/.cache/sparsekern.

    None where neither is known: a process without HOME whose user has no entry in the system.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # the specification says to ignore a relative one
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None
        root = os.path.join(home, ".cache")
    return Path(root) / "sparsekern"


class TuningCache:
    """Timings in one JSON file: {version, devices: {device: {layer: [dense_ms, sparse_ms]}}}.

    A file that cannot be read is ignored with a warning; one that cannot be written costs nothing
    but the next conversion's time, and is said once. With `on_disk` off no path is touched, and
    timings are shared by the layers of one conversion only.

    Args:
        key: What the timings hold for: device, versions, threads.
        on_disk: Whether to read and write the file.
    """

    def __init__(self, key: str, on_disk: bool = True):
        folder = cache_folder() if on_disk else None
        self.path = None if folder is None else folder / "tuning.json"
        self.key = key
        self.entries: dict[str, list[float]] = self._read().get(key, {}) if self.path else {}
        self._fresh: dict[str, list[float]] = {}

    def get(self, layer: str) -> tuple[float, float] | None:
        """Dense and sparse milliseconds, None when unknown."""
        found = self.entries.get(layer)
        return (found[0], found[1]) if found else None

    def put(self, layer: str, dense_ms: float, sparse_ms: float) -> None:
        """Remember a timing; written by `save`."""
        self.entries[layer] = self._fresh[layer] = [dense_ms, sparse_ms]

    def save(self) -> None:
        """Merge what is new into the file: under a lock, atomically, without anything left over."""
        if not self._fresh or self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.parent) as alone:
                if alone:
                    _remove_leftovers(self.path.parent)
                devices = self._read()
                devices[self.key] = {**devices.get(self.key, {}), **self._fresh}
                _replace(self.path, json.dumps({"version": VERSION, "devices": devices}))
        except OSError as error:
            warnings.warn(
                f"sparsekern: tuning results were not kept, cannot write {self.path}: {error}",
                stacklevel=2,
            )
        self._fresh = {}

    def _read(self) -> dict:
        try:
            data = json.loads(_regular_text(self.path))
            if data["version"] != VERSION:
                return {}
            _check(data["devices"])
            return data["devices"]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        # RecursionError: deeply nested; OverflowError: an integer that is no float.
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
            OverflowError, MemoryError,
        ) as error:  # fmt: skip
            warnings.warn(
                f"sparsekern: ignoring the tuning cache {self.path}, it cannot be read: "
                f"{_short(error)}",
                stacklevel=2,
            )
            return {}


def _short(error: Exception) -> str:
    text = repr(error)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check(devices) -> None:
    for entries in devices.values():
        for times in entries.values():
            numbers = type(times) is list and [type(t) for t in times]
            right = numbers and len(numbers) == 2 and set(numbers) <= {int, float}
            if not right or not all(t > 0 and math.isfinite(t) for t in times):
                raise ValueError(f"bad timing {times}")


def _regular_text(path: Path) -> str:
    """The text of a regular file; a FIFO in its place must not make anybody wait."""
    wait_not = getattr(os, "O_NONBLOCK", 0)
    file = os.open(path, os.O_RDONLY | wait_not | getattr(os, "O_CLOEXEC", 0))
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise _NoFile("no regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{status.st_size} bytes, more than {MAX_BYTES}")
        with open(file, "rb", closefd=False) as stream:
            return stream.read(MAX_BYTES).decode()
    finally:
        os.close(file)


def _replace(path: Path, text: str) -> None:
    """Write a file in one step; on any failure nothing is left behind."""
    if path.exists() and not path.is_file():
        raise _NoFile("no regular file")
    handle, name = tempfile.mkstemp(".tmp", "tuning-", path.parent)
    try:
        with open(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:  # a full disk, Ctrl-C
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _remove_leftovers(folder: Path) -> None:
    """Files of writers that were killed; nobody else writes while we hold the lock."""
    for path in folder.glob(_TEMPORARY):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def _locked(folder: Path):
    """One writer at a time, in threads and processes; tells whether the lock was obtained.

    The lock is one on the folder, so that no file is left. Where the file system has none, or
    somebody keeps it, writing goes on without: entries may then be lost, nothing else.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(handle)
    finally:
        os.close(handle)  # gives the lock back


def _lock(handle: int) -> bool:
    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        except OSError:
            return False
