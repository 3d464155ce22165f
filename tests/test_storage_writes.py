"""save replaces a file only when the new one is whole: full disks, interrupts, links."""

import os
import resource
from contextlib import contextmanager

import pytest
from torch import nn

from sparsekern.storage import save


@contextmanager
def largest_file(size: int):
    """Every write past `size` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "m"
    save(nn.Linear(4, 4), path)
    before = path.read_bytes()
    with largest_file(2048), pytest.raises(OSError, match=r"save: could not write .*/m: .*unchang"):
        save(nn.Linear(100, 100), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m"]


def test_interrupt_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "m"
    save(nn.Linear(4, 4), path)
    before = path.read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(nn.Linear(100, 100), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m"]


def test_missing_folder_and_links(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"save: could not write .*No such file"):
        save(nn.Linear(2, 2), tmp_path / "none" / "m")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    save(nn.Linear(2, 2), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").is_file()
    (tmp_path / "plain").touch()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode
