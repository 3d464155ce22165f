"""Reports of comparisons and sweeps: self-contained pages, written whole or not at all."""

import errno
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from measure_common import compared

from sparsekern.measure import report_html as reports
from sparsekern.measure import write_sweep_html

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def comparison():
    return compared()


class Page(HTMLParser):
    """Collects what a browser would load from elsewhere, and checks that tags close."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.outside, self.svgs, self.ids = [], [], 0, []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.svgs += tag == "svg"
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.outside.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_html_is_self_contained(comparison, tmp_path):
    path = comparison.to_html(tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.outside == [] and page.svgs == 2
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert "Horowitz" in text and comparison.hardware["cpu"] in text
    assert [p for p in tmp_path.iterdir() if p.is_file()] == [path]


def sweep_rows():
    return [
        {"pattern": p, "sparsity": s, "speedup": 1 + s, "accuracy": 0.8 - s / 10,
         "dense_accuracy": 0.8, "dense_ms": 2.0, "sparse_ms": 1.0, "dense_joules": 2e-3,
         "sparse_joules": 1e-3, "energy_source": "modelled", "dense_bytes": 4000,
         "sparse_bytes": 1000, "layers_sparse": 3, "layers_dense": 1, "second task": 0.5}
        for p in ("unstructured", "<b>evil</b>") for s in (0.3, 0.9)
    ]  # fmt: skip


def test_sweep_html(tmp_path):
    path = write_sweep_html(
        tmp_path / "sweep.html", "A <sweep>", sweep_rows(), ["A note."],
        accuracy_label="Spearman correlation", hardware={"cpu": "x", "threads": 1, "torch": "2"},
    )  # fmt: skip
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.svgs == 3 and page.outside == []
    assert "<b>evil" not in text and "A &lt;sweep&gt;" in text
    assert "2.00 → 1.00 ms" in text and "energy, modelled</th>" in text
    assert "second task" in text and "A note." in text
    assert "1.30x" in text  # 0.77 keeps 95 % of 0.8; 0.71 at 1.90x does not, so it does not lead
    assert "unstructured at 30 %, fastest that keeps 95 %" in text


def test_sweep_html_without_optional_keys(tmp_path):
    rows = [{"pattern": "2:4", "sparsity": 0.5, "speedup": 0.8}]
    text = write_sweep_html(tmp_path / "s.html", "t", rows).read_text(encoding="utf-8")
    assert Page(text).svgs == 1
    assert "accuracy</th>" not in text and "energy</th>" not in text  # nobody has a value
    assert "1.25x" in text and "slower" in text


def test_sweep_html_refuses_bad_rows(tmp_path):
    with pytest.raises(ValueError, match="write_sweep_html: expected at least one row, got none"):
        write_sweep_html(tmp_path / "s.html", "t", [])
    with pytest.raises(ValueError, match=r"expected rows\[0\] to have sparsity, speedup, got"):
        write_sweep_html(tmp_path / "s.html", "t", [{"pattern": "2:4"}])


def test_layers_and_a_reverted_conversion_are_shown(comparison, tmp_path):
    layer = {
        "name": "encoder.0", "kind": "linear", "shape": (8, 8), "pattern": "unstructured",
        "sparsity": 0.9, "format": "csr", "dense_ms": 2.0, "sparse_ms": 1.0, "max_error": 0.0,
        "reason": "",
    }  # fmt: skip
    kept = {**layer, "name": "head", "format": "dense", "sparse_ms": None, "reason": "too small"}
    changed = replace(
        comparison, layers=(layer, kept), layers_sparse=1, layers_dense=1, reverted=True
    )
    text = changed.to_html(tmp_path / "r.html").read_text(encoding="utf-8")
    assert Page(text).svgs == 3
    assert "encoder.0" in text and "too small" in text and "was taken back" in text
    assert "1 / 1" in changed.table() and "went back to it" in changed.table()


def test_full_disk_leaves_the_old_report_whole(comparison, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reports.os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*report.html: No space left on device"):
        comparison.to_html(path)
    assert path.read_text() == "old"
    assert [p for p in tmp_path.iterdir() if p.is_file()] == [path]


def test_missing_folder_is_one_clear_error(comparison, tmp_path):
    with pytest.raises(OSError, match=r"could not write .*r.html: No such file or directory"):
        comparison.to_html(tmp_path / "absent" / "r.html")


def test_missing_report_packages_are_named(comparison, tmp_path, monkeypatch):
    find = reports.importlib.util.find_spec
    monkeypatch.setattr(
        reports.importlib.util, "find_spec", lambda p: None if p == "jinja2" else find(p)
    )
    with pytest.raises(ImportError, match=r"needs the package jinja2; pip install jinja2"):
        comparison.to_html(tmp_path / "r.html")
