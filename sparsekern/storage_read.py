"""What a file holds, by name; nothing in it is trusted, and nothing is read before it is wanted.

An entry tells its shape before its tensors are touched, so that whoever fills a model compares it
with the layer first: no size in a file makes us allocate or compute more than that layer.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .nn import ACTIVATIONS
from .storage_codec import PARTS, Packed, check_header, check_packed, decode, shortened, unpack
from .weight_base import SparseWeight

HEADER_KEY = "sparsekern"
VERSION = 2
READABLE = (1, 2)  # 1 had no `packed`, `activations` and `fused`
# A description takes a few hundred bytes; more than this is no header of ours.
HEADER_BYTES, HEADER_BYTES_PER_TENSOR = 1 << 20, 1 << 12


@dataclass(frozen=True)
class Entry:
    """One parameter, buffer or sparse weight of a file.

    Attributes:
        shape: Of the dense tensor.
        read: Gives the tensor, the sparse weight, or what has a dtype and a `to_dense` for one;
            checked, ValueError where that is no such.
        is_sparse: Whether it is the weight of a sparse layer.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor | SparseWeight | Packed]
    is_sparse: bool = False


@dataclass
class StoredFile:
    """A file that is open.

    Attributes:
        path: Where it is, or what else it is in messages.
        entries: What it holds.
        aliases: Further names of tied entries -> the name of the entry.
        folded: Names of normalisations that are folded.
        activations: Name of a sparse layer -> the activation it computes.
        fused: Name of an activation that layers compute -> the names of those layers.
    """

    path: Path | str
    entries: dict[str, Entry] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    activations: dict[str, str] = field(default_factory=dict)
    fused: dict[str, list[str]] = field(default_factory=dict)


@contextmanager
def opened(path: Path) -> Iterator[StoredFile]:
    """Open a file and check its headers.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no regular file, no safetensors file, or its headers are damaged.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    _refuse_special(path)
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"load: {path} is no valid safetensors file: {error}") from error
    except OSError as error:
        raise OSError(error.errno, f"load: could not read {path}: {error}") from error
    with file:
        try:
            yield _stored(path, file)
        except _Damaged as error:
            raise ValueError(f"load: {path} is damaged: {error}") from error


class _Damaged(ValueError):
    """Headers that are not what `save` writes."""


def _refuse_special(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else type(error)
        raise kind(error.errno, f"load: expected a file, got {path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO"}
        got = kinds.get(stat.S_IFMT(mode), "a device or socket")
        raise ValueError(f"load: expected a file, got {path}, {got}")


def _stored(path: Path, file) -> StoredFile:
    names, metadata = list(file.keys()), file.metadata() or {}
    tensors = {name: _tensor_entry(file, name) for name in names}
    if HEADER_KEY not in metadata:
        return StoredFile(path, tensors)
    try:
        header = _parse(metadata[HEADER_KEY], len(names))
        entries = _assemble(tensors, header["layers"], header["packed"])
        _check_aliases(header["aliases"], entries)
    except ValueError as error:
        raise _Damaged(str(error)) from error
    rest = (header[key] for key in ("aliases", "folded", "activations", "fused"))
    return StoredFile(path, entries, *rest)


def _tensor_entry(file, name: str) -> Entry:
    def read() -> Tensor:
        try:
            return file.get_tensor(name)
        except Exception as error:  # a dtype or size that torch does not have
            raise ValueError(f"expected a tensor that torch can hold, got {error}") from error

    return Entry(tuple(file.get_slice(name).get_shape()), read)


def _parse(text: str, tensors: int) -> dict:
    """The header with all its keys, each of the right type."""
    limit = HEADER_BYTES + HEADER_BYTES_PER_TENSOR * tensors
    if len(text) > limit:
        raise ValueError(f"its {HEADER_KEY} header has {len(text)} bytes, more than {limit}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {HEADER_KEY} header is no JSON ({error})") from error
    if not isinstance(header, dict) or type(header.get("version")) is not int:
        raise ValueError(f"its {HEADER_KEY} header has no version")
    if header["version"] not in READABLE:
        raise ValueError(
            f"expected format version {' or '.join(map(str, READABLE))}, got {header['version']}; "
            "a newer sparsekern may read it"
        )
    if not isinstance(header.get("layers"), dict) or not isinstance(header.get("aliases"), dict):
        raise ValueError(f"its {HEADER_KEY} header has no layers or aliases")
    found = {"folded": [], "packed": {}, "activations": {}, "fused": {}, **header}
    _check_names("folded", found["folded"])
    for key in ("packed", "activations", "fused"):
        if not isinstance(found[key], dict):
            raise ValueError(f"expected {key} by name, got {shortened(found[key])}")
    for name, layers in found["fused"].items():
        _check_names(f"fused {name!r}", layers)
    for name, kind in found["activations"].items():
        if not isinstance(kind, str) or kind not in ACTIVATIONS:
            wanted = ", ".join(ACTIVATIONS)
            raise ValueError(f"expected {name!r} to compute {wanted}, got {shortened(kind)}")
    return found


def _check_names(what: str, names) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected {what} as a list of names, got {shortened(names)}")


def _assemble(tensors: dict[str, Entry], layers: dict, packed: dict) -> dict[str, Entry]:
    """Put the parts of each sparse weight and packed tensor together."""
    entries = dict(tensors)
    kinds = (layers, check_header, decode, True), (packed, check_packed, unpack, False)
    for described, check, decoded, is_sparse in kinds:
        for name, header in described.items():
            try:
                check(header)
                parts = _parts(name, header, tensors)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
            for part in PARTS[header["encoding"]]:
                entries.pop(key_of(name, part), None)
            if name in entries:
                raise ValueError(f"layer {name!r} is there twice, dense and sparse")
            read = _reader(decoded, header, parts)
            entries[name] = Entry(tuple(header["shape"]), read, is_sparse)
    return entries


def _parts(name: str, header: dict, tensors: dict[str, Entry]) -> dict[str, Entry]:
    keys = {part: key_of(name, part) for part in PARTS[header["encoding"]]}
    absent = [key for key in keys.values() if key not in tensors]
    if absent:
        raise ValueError(f"it lacks {', '.join(absent)}")
    return {part: tensors[key] for part, key in keys.items()}


def _reader(decoded: Callable, header: dict, parts: dict[str, Entry]):
    def read():
        return decoded(header, {part: entry.read() for part, entry in parts.items()})

    return read


def _check_aliases(aliases: dict, entries: dict[str, Entry]) -> None:
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in entries or alias in entries:
            raise ValueError(f"alias {alias!r} refers to {shortened(name)}")


def key_of(name: str, part: str) -> str:
    """Name of a part of a weight; the weight may be the model itself."""
    return f"{name}.{part}" if name else part
