"""A file that takes its place only when it is whole, and what a killed writer left behind."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows; nothing is cleaned there
    fcntl = None

PREFIX = ".sparsekern-save-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path for a fresh file that takes the place of `path` when the block ends well.

    The fresh file lies in a folder of its own beside `path`, which is locked while it is written:
    a folder without a lock belongs to a writer that was killed, and goes.

    Raises:
        OSError: `path` is no regular file (a folder, a FIFO, a device), or cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    _refuse_special(path)
    _clean(path.parent)
    folder, lock = _own_folder(path.parent)
    try:
        mode = _granted_mode(folder)
        yield folder / "new"
        os.chmod(folder / "new", mode)  # safetensors makes files private
        with open(folder / "new", "rb+") as file:
            os.fsync(file.fileno())
        os.replace(folder / "new", path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _refuse_special(path: Path) -> None:
    with suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO"}
            got = kinds.get(stat.S_IFMT(mode), "a device or socket")
            raise OSError(f"expected a file or a new name, got {got}")


def _own_folder(parent: Path) -> tuple[Path, int | None]:
    """A new folder, and a descriptor that holds its lock (None where there are no locks)."""
    while True:
        folder = parent / f"{PREFIX}{uuid.uuid4().hex}"
        folder.mkdir(mode=0o700)
        lock = _locked(folder, wait=True)
        # Between the two lines another save may have taken it for a folder that was left behind.
        if folder.exists():
            return folder, lock
        if lock is not None:
            os.close(lock)


def _locked(folder: Path, wait: bool) -> int | None:
    """A descriptor with the lock of a folder; None where another has it or there are no locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _clean(parent: Path) -> None:
    """Remove what killed saves left in a folder; what cannot be removed stays."""
    with suppress(OSError):
        for folder in [entry for entry in os.scandir(parent) if entry.name.startswith(PREFIX)]:
            lock = _locked(Path(folder.path), wait=False)
            if lock is not None:
                shutil.rmtree(folder.path, ignore_errors=True)
                os.close(lock)


def _granted_mode(folder: Path) -> int:
    """The mode that the umask grants a new file."""
    probe = folder / "mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode
