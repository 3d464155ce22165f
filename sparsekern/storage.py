"""save and load: models with sparse layers as safetensors files, never pickle.

A file is a plain safetensors file. Each sparse weight `<name>` is stored as `<name>.values` and its
positions (see `storage_codec`); everything else is stored under its state_dict key. The header key
`sparsekern` holds JSON: `{"version": 1, "layers": {name: {shape, pattern, encoding}}, "aliases":
{name: stored name}, "folded": [names of folded normalisations]}`. Kernel schedules are not stored,
so a file serves every device and ISA.
"""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .prune.targets import is_conv1d_of_transformers
from .storage_codec import PARTS, check_header, decode, encode
from .storage_folded import check_folded, folded_like, folded_names
from .weight_base import SparseWeight
from .weights import BlockWeight, NMWeight

HEADER_KEY = "sparsekern"
VERSION = 1


class LoadedKeys(NamedTuple):
    """What `load(..., strict=False)` could not match: names only in the model, only in the file."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass
class _File:
    """Stored tensors and sparse weights by name, further names of tied ones, folded names."""

    entries: dict[str, "Tensor | SparseWeight"] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)


def save(model: nn.Module, path: str | os.PathLike) -> Path:
    """Write the parameters and buffers of a model to a safetensors file.

    Sparse weights are stored sparse, all other tensors as they are; a tensor with several names
    (tied weights, shared modules) is stored once. The file at `path` is replaced only when the new
    one is complete and on disk; after a failure the old one is whole and nothing is left beside it.

    Args:
        model: Any module, on any device. The file does not depend on device or instruction set.
        path: The file to write; its folder must exist.

    Returns:
        The path.

    Raises:
        TypeError: `model` is no module, or its state holds something other than plain tensors.
        ValueError: A tensor is on the meta device.
        OSError: The file cannot be written (missing folder, no permission, full disk).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    _check_module("save", model)
    tensors, layers, aliases = _collect(model)
    header = {"version": VERSION, "layers": layers, "aliases": aliases}
    header["folded"] = folded_names(model)
    path = Path(path)
    try:
        with _replacing(path) as temporary:
            save_file(tensors, temporary, metadata={HEADER_KEY: json.dumps(header)})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"save: could not write {path}: {reason}; what was there is unchanged"
        number = getattr(error, "errno", None)
        raise (OSError(number, message) if number else OSError(message)) from error
    return path


def load(model: nn.Module, path: str | os.PathLike, strict: bool = True) -> LoadedKeys:
    """Fill a model from a safetensors file; all or nothing.

    Sparse and dense meet freely. A sparse layer takes over the positions and pattern of a sparse
    weight in the file (with another number of nonzeros its `values` become a new parameter: make
    optimizers afterwards), and from a dense weight the values at its own positions. A dense layer
    gets a sparse weight with its zeros filled in. Tensors tied in the file are tied in the model.
    Values are converted to the dtype and device of the model, also from and to int8. Batch
    normalisations that are folded in the file are folded in the model; which layers compute an
    activation is up to the model.

    Args:
        model: A module with the layers of the saved one; changed in place.
        path: A file `save` wrote, or any safetensors file of a state_dict.
        strict: Whether names that only one side has are an error.

    Returns:
        The names that did not match (both lists empty when strict).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or an index in it is invalid; path and reason are named. Or
            a dense weight has nonzeros where the sparse layer has no position.
        RuntimeError: Names or shapes do not match, as from `nn.Module.load_state_dict`.
    """
    _check_module("load", model)
    stored = _read(Path(path))
    with folded_like(model, stored.folded, stored.entries):
        return _fill(model, path, stored, strict)


def _fill(model: nn.Module, path, stored: _File, strict: bool) -> LoadedKeys:
    targets = _targets(model)
    _refuse_meta(targets)
    entries = {**stored.entries, **{a: stored.entries[n] for a, n in stored.aliases.items()}}
    keys = LoadedKeys(
        [name for name in targets if name not in entries],
        [name for name in entries if name not in targets],
    )
    matched = {name: entries[name] for name in targets if name in entries}
    _refuse_mismatches(model, path, targets, matched, keys if strict else None)
    ready = {name: _fitted(model, name, targets[name], e) for name, e in matched.items()}
    _check_ties(targets, ready)
    _apply(model, stored.aliases, targets, ready)
    return keys


def _check_module(op: str, model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected a torch.nn.Module, got {type(model).__name__}")


def _key(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _sparse_weights(model: nn.Module) -> dict[str, SparseWeight]:
    """Every sparse weight under every name it goes by."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, SparseWeight)}


def _targets(model: nn.Module) -> dict[str, "Tensor | SparseWeight"]:
    """What a file can fill, by name: sparse weights, and all other parameters and buffers."""
    sparse = _sparse_weights(model)
    covered = {_key(name, part) for name, weight in sparse.items() for part in weight.parts}
    state = model.state_dict(keep_vars=True)
    return {**{k: v for k, v in state.items() if k not in covered}, **sparse}


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict, dict[str, str]]:
    """Tensors to write, descriptions of the sparse weights, and names of what is there already."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict] = {}
    aliases: dict[str, str] = {}
    first: dict = {}
    for name, item in _targets(model).items():
        original = first.setdefault(_identity(name, item), name)
        if original != name:
            aliases[name] = original
        elif isinstance(item, SparseWeight):
            layers[name], parts = encode(item)
            tensors.update({_key(name, part): t for part, t in parts.items()})
        else:
            # A copy even if contiguous: two views of one storage would be refused.
            tensors[name] = item.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, layers, aliases


def _identity(name: str, item):
    """Equal for two names of the same memory; refuses what a file cannot hold."""
    values = item.values if isinstance(item, SparseWeight) else item
    if not isinstance(values, Tensor) or values.layout != torch.strided:
        got = values.layout if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"save: expected {name!r} to be a dense tensor, got {got}")
    if values.is_meta:
        raise ValueError(f"save: expected {name!r} to hold data, got a tensor on the meta device")
    if isinstance(item, SparseWeight) or values.numel() == 0:
        return id(item)
    return values.device, values.data_ptr(), values.dtype, values.shape, values.stride()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A fresh file beside `path` that takes its place when the block ends well, else vanishes."""
    path = Path(os.path.realpath(path))  # a link stays a link
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        open(temporary, "xb").close()
        mode = temporary.stat().st_mode  # what the umask grants; safetensors makes files private
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _read(path: Path) -> _File:
    """Read and check a whole file; nothing in it is trusted."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"load: expected a file, got {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"load: {path} is no valid safetensors file: {error}") from error
    if HEADER_KEY not in metadata:
        return _File(tensors)
    try:
        layers, aliases, folded = _parse_header(metadata[HEADER_KEY])
        return _File(_assemble(tensors, layers, aliases), aliases, folded)
    except ValueError as error:
        raise ValueError(f"load: {path} is damaged: {error}") from error


def _parse_header(text: str) -> tuple[dict, dict[str, str], list[str]]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {HEADER_KEY} header is no JSON ({error})") from error
    if not isinstance(header, dict) or type(header.get("version")) is not int:
        raise ValueError(f"its {HEADER_KEY} header has no version")
    if header["version"] != VERSION:
        raise ValueError(
            f"expected format version {VERSION}, got {header['version']}; "
            "a newer sparsekern may read it"
        )
    layers, aliases = header.get("layers"), header.get("aliases")
    if not isinstance(layers, dict) or not isinstance(aliases, dict):
        raise ValueError(f"its {HEADER_KEY} header has no layers or aliases")
    return layers, aliases, check_folded(header.get("folded", []))


def _assemble(tensors: dict[str, Tensor], layers: dict, aliases: dict) -> dict:
    """Put the parts of each sparse weight together, and check that aliases lead somewhere."""
    entries: dict = dict(tensors)
    for name, header in layers.items():
        try:
            check_header(header)
            keys = {part: _key(name, part) for part in PARTS[header["encoding"]]}
            absent = [key for key in keys.values() if key not in tensors]
            if absent:
                raise ValueError(f"it lacks {', '.join(absent)}")
            weight = decode(header, {part: entries.pop(key) for part, key in keys.items()})
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        if name in entries:
            raise ValueError(f"layer {name!r} is there twice, dense and sparse")
        entries[name] = weight
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in entries or alias in entries:
            raise ValueError(f"alias {alias!r} refers to {name!r}")
    return entries


def _refuse_meta(targets) -> None:
    for name, target in targets.items():
        values = target.values if isinstance(target, SparseWeight) else target
        if not isinstance(values, Tensor):
            raise TypeError(f"load: expected {name!r} to be a tensor, got {type(values).__name__}")
        if values.is_meta:
            raise ValueError(
                f"load: expected a model with memory, got {name!r} on the meta device; "
                "call model.to_empty(device=...) first"
            )


def _refuse_mismatches(model, path, targets, matched, keys: LoadedKeys | None) -> None:
    """Raise one RuntimeError that lists unmatched keys (if given) and all wrong shapes."""
    problems = []
    if keys:
        named = ("Missing", keys.missing_keys), ("Unexpected", keys.unexpected_keys)
        problems += [f"{kind} key(s): {', '.join(map(repr, k))}." for kind, k in named if k]
    for name, entry in matched.items():
        found, wanted = tuple(entry.shape), tuple(targets[name].shape)
        mixed = isinstance(entry, SparseWeight) != isinstance(targets[name], SparseWeight)
        if mixed and _is_transposed(model, name):
            found = found[::-1]
        if found != wanted:
            sizes = f"{found} in the file, {wanted} in the model"
            problems.append(f"size mismatch for {name}: {sizes}.")
    if problems:
        title = f"load: error(s) in loading {path} for {type(model).__name__}:"
        raise RuntimeError("\n\t".join([title, *problems]))


def _is_transposed(model: nn.Module, name: str) -> bool:
    """Whether the dense form of the weight `name` is (in, out), as in transformers' Conv1D."""
    parent, _, attribute = name.rpartition(".")
    owner = model.get_submodule(parent)
    conv1d = getattr(owner, "transposed", False) is True or is_conv1d_of_transformers(owner)
    return conv1d and attribute == "weight"


@torch.no_grad()
def _fitted(model: nn.Module, name: str, target, entry):
    """The entry in the form of its target: a tensor, or a sparse weight of the same format."""
    if isinstance(target, SparseWeight):
        if isinstance(entry, SparseWeight):
            return _recast(name, target, entry)
        dense = entry.t() if _is_transposed(model, name) else entry
        return _gather(name, target, dense)
    if not isinstance(entry, SparseWeight):
        return entry
    dense = entry.to_dense()
    return dense.t() if _is_transposed(model, name) else dense


def _recast(name: str, target: SparseWeight, entry: SparseWeight) -> SparseWeight:
    """The entry in the format of the target, if that can hold it."""
    try:
        if target.format != entry.format:
            own = isinstance(target, (BlockWeight, NMWeight))
            pattern = target.pattern if own else entry.pattern
            return type(target).from_dense(entry.to_dense(), entry.mask(), pattern, target.groups)
        if isinstance(target, BlockWeight):
            target._check({part: getattr(entry, part) for part in entry.parts})
        return entry
    except ValueError as error:
        raise ValueError(
            f"load: expected a weight {name!r} that fits format {target.format} of the sparse "
            f"layer, got one of pattern {entry.pattern} ({error})"
        ) from error


def _gather(name: str, weight: SparseWeight, dense: Tensor) -> SparseWeight:
    values = weight.gather(dense.to(weight.device)).cpu()
    lost = int(dense.count_nonzero()) - int(values.count_nonzero())
    if lost:
        raise ValueError(
            f"load: expected the dense weight {name!r} to be zero outside the pattern of the "
            f"sparse layer, got {lost} nonzeros there; prune it first or load into a dense model"
        )
    return weight.refilled(values)


def _check_ties(targets, ready) -> None:
    """A target with several names must get one content."""
    first: dict[int, str] = {}
    for name, content in ready.items():
        original = first.setdefault(id(targets[name]), name)
        other = ready[original]
        if content is other:
            continue
        names = content.parts if isinstance(content, SparseWeight) else ()
        pairs = [(getattr(content, n), getattr(other, n)) for n in names] or [(content, other)]
        if not all(torch.equal(a, b) for a, b in pairs):
            raise ValueError(
                f"load: expected one content for {original!r} and {name!r}, which the model ties, "
                "got two that differ"
            )


@torch.no_grad()
def _apply(model: nn.Module, aliases: dict[str, str], targets, ready) -> None:
    for alias, name in aliases.items():
        if alias in ready and name in ready and targets[alias] is not targets[name]:
            _tie(model, alias, targets[alias], targets[name])
    for name, content in ready.items():
        target = targets[name]
        if isinstance(content, SparseWeight):
            target.take(content)
        else:
            target.copy_(content)


def _tie(model: nn.Module, alias: str, old, new) -> None:
    """Let `alias` mean the same parameter or sparse weight as another name, where kinds agree."""
    parent, _, attribute = alias.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(old, SparseWeight) and isinstance(new, SparseWeight):
        if (old.format, old.groups) == (new.format, new.groups):
            owner._modules[attribute] = new
    elif isinstance(old, nn.Parameter) and isinstance(new, nn.Parameter):
        if (old.dtype, old.device) == (new.dtype, new.device):
            owner._parameters[attribute] = new
