"""save replaces a file only when the new one is whole: full disks, interrupts, links."""

import os
import resource
import signal
from contextlib import contextmanager

import pytest
from torch import nn

from sparsekern.storage import load, save
from sparsekern.storage_write import PREFIX, replacing


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


def test_what_killed_saves_left_goes_and_a_running_one_stays(tmp_path):
    (tmp_path / f"{PREFIX}dead").mkdir()
    (tmp_path / f"{PREFIX}dead" / ".tmp123").write_bytes(b"half")
    with replacing(tmp_path / "other") as running:
        running.write_bytes(b"whole")
        save(nn.Linear(2, 2), tmp_path / "m")
        assert running.exists()
    assert sorted(os.listdir(tmp_path)) == ["m", "other"]
    assert (tmp_path / "other").read_bytes() == b"whole"


def test_a_killed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "m"
    save(nn.Linear(4, 4), path)
    before, child = path.read_bytes(), os.fork()
    if child == 0:
        with replacing(path) as fresh:
            fresh.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_bytes() == before and len(os.listdir(tmp_path)) == 2
    save(nn.Linear(4, 4), path)
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("kind", ["folder", "FIFO", "device"])
def test_paths_that_are_no_files(tmp_path, kind):
    path = tmp_path / "odd"
    if kind == "device":
        path = "/dev/null"
    else:
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(OSError, match=f"save: could not write .*expected a file .*{kind}"):
        save(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=f"load: expected a file, got .*{kind}"):
        load(nn.Linear(2, 2), path)
    assert not list(tmp_path.glob(f"{PREFIX}*"))


def test_the_longest_names_can_be_written(tmp_path):
    save(nn.Linear(2, 2), tmp_path / ("x" * 255))
    assert os.listdir(tmp_path) == ["x" * 255]
