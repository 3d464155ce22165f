"""Results of an experiment as lines of JSON, so that a run that was stopped goes on."""

import json
import os
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path

import sparsekern
from sparsekern.measure import commit, hardware, write_atomically

FORMAT, VERSION = "sparsekern experiment", 1
FOLDER = Path(__file__).resolve().parent


class RecordsError(ValueError):
    """A file that holds something else, or results of other settings."""


class Records:
    """The results in one file: a header for every run of the program, a record for every key.

    Attributes:
        path: The file.
        done: What `add` was given, by key, in the order of the file.
        header: The last header; None in a new file.
    """

    def __init__(self, path: Path):
        """Read what the file holds.

        Raises:
            RecordsError: Not a file of results.
        """
        self.path, self.header = path, None
        self.done: dict[str, dict] = {}
        for line in self._lines():
            if line.get("type") == "header":
                self.header = line
            elif "key" in line and self.header is not None:
                self.done[_name(line["key"])] = line
            else:
                raise RecordsError(f"records: expected results in {path}, got {str(line)[:60]!r}")

    def start(self, experiment: str, settings: Mapping[str, object]) -> None:
        """Write a header; settings must be those of the results that are there.

        Raises:
            RecordsError: They are others.
        """
        head = {"experiment": experiment, "settings": json.loads(json.dumps(dict(settings)))}
        for name, value in head.items():
            if self.header is not None and self.header[name] != value:
                raise RecordsError(
                    f"records: expected {name} {self.header[name]}, as in {self.path}, got "
                    f"{value}; name another file by --out"
                )
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._append(
            {
                "type": "header",
                "format": FORMAT,
                "version": VERSION,
                **head,
                "date": now,
                "commit": commit(FOLDER),
                "sparsekern": sparsekern.__version__,
                "hardware": hardware(),
            }
        )

    def missing(self, keys: Iterable[Mapping]) -> list[Mapping]:
        """Those of the keys that have no record yet."""
        return [key for key in keys if _name(key) not in self.done]

    def add(self, key: Mapping, values: Mapping) -> None:
        """Write the results of a key; on disk when this returns."""
        record = _tidy({"key": dict(key), **values})
        self._append(record)
        self.done[_name(key)] = record

    def _lines(self) -> list[dict]:
        if not self.path.exists():
            return []
        found = []
        for text in self.path.read_text("utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # torn, by a run that was killed
            if not isinstance(line, dict):
                raise RecordsError(f"records: expected results in {self.path}, got {text[:60]!r}")
            found.append(line)
        return found

    def _append(self, record: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" * torn + json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if record.get("type") == "header":
            self.header = record


def _name(key: Mapping) -> str:
    return json.dumps(_tidy(dict(key)), sort_keys=True)


def _tidy(value):
    """The same with six significant digits: more would be noise in a committed file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _tidy(v) for key, v in value.items()}
    return [_tidy(v) for v in value] if isinstance(value, list | tuple) else value


def update_page(page: Path, regions: dict[str, str]) -> None:
    """Write regions between their markers.

    Raises:
        RecordsError: The page lacks a marker.
    """
    text = page.read_text("utf-8")
    for name, content in regions.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if start not in text or end not in text:
            raise RecordsError(f"page: expected {start} and {end} in {page}, got a page without")
        before, rest = text.split(start, 1)
        text = f"{before}{start}\n{content}\n{end}{rest.split(end, 1)[1]}"
    write_atomically(page, text)
