"""save and load: models with sparse layers as safetensors files, never pickle.

A file is a plain safetensors file. Each sparse weight `<name>` is stored as `<name>.values` and its
positions (see `storage_codec`), and so is a dense tensor with many zeros; everything else is stored
under its state_dict key. The header key `sparsekern` holds JSON: `{"version": 2, "layers": {name:
{shape, pattern, encoding}}, "packed": {name: {shape, encoding}}, "aliases": {name: stored name},
"folded": [names of folded normalisations], "activations": {sparse layer: what it computes},
"fused": {activation: [layers that compute it]}}`. Kernel schedules are not stored, so a file serves
every device and ISA.
"""

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .storage_build import Builder, activations_of
from .storage_codec import encode, pack_dense
from .storage_fit import Content, Fitter, is_transposed, refuse_targets, targets_of
from .storage_folded import folded_like, folded_names
from .storage_parts import given, join
from .storage_read import HEADER_KEY, VERSION, StoredFile, key_of, opened
from .storage_write import replacing
from .weight_base import SparseWeight, overwrite


class LoadedKeys(NamedTuple):
    """What `load(..., strict=False)` could not match: names only in the model, only in the file."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def save(model: nn.Module, path: str | os.PathLike) -> Path:
    """Write the parameters and buffers of a model to a safetensors file.

    Sparse weights are stored sparse; dense tensors of floating point with many zeros, as pruning
    leaves them, are packed without a loss of a bit; all others are stored as they are. A tensor
    with several names (tied weights, shared modules) is stored once. The file at `path` is replaced
    only when the new one is complete and on disk; after a failure the old one is whole and nothing
    is left beside it. What a save that was killed left beside it goes with the next one.

    Args:
        model: Any module, on any device. The file does not depend on device or instruction set.
        path: The file to write; its folder must exist.

    Returns:
        The path.

    Raises:
        TypeError: `model` is no module, or its state holds something other than plain tensors.
        ValueError: A tensor is on the meta device.
        OSError: The file cannot be written (missing folder, no permission, full disk), or `path` is
            a folder, a FIFO or a device.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    _check_module("save", model)
    tensors, layers, packed, aliases = _collect(model)
    header = {"version": VERSION, "layers": layers, "packed": packed, "aliases": aliases}
    header["folded"] = folded_names(model)
    header["activations"], header["fused"] = activations_of(model)
    path = Path(path)
    try:
        with replacing(path) as fresh:
            save_file(tensors, fresh, metadata={HEADER_KEY: json.dumps(header)})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"save: could not write {path}: {reason}; what was there is unchanged"
        number = getattr(error, "errno", None)
        raise (OSError(number, message) if number else OSError(message)) from error
    return path


def load(
    model: nn.Module, path: str | os.PathLike | Mapping, strict: bool = True, dense: bool = False
) -> LoadedKeys:
    """Fill a model from a safetensors file or a state_dict; all or nothing.

    Layers become what they are in the file: where it has the weight of a sparse layer and the model
    a dense linear or convolution layer, a sparse one takes its place, without timing anything. With
    `dense=True` such layers stay dense and get the weight with its zeros filled in. The layer that
    is the model itself, and layers that `convert_to_sparse` would not take, stay dense, too. A
    model on the meta device gets memory on the CPU for what the file has, and no more than that.

    A sparse layer takes over the positions and pattern of a sparse weight in the file (with another
    number of nonzeros its `values` become a new parameter: make optimizers afterwards), and from a
    dense weight the values at its own positions. Tensors tied in the file are tied in the model.
    `x_orig` and `x_mask`, as torch.nn.utils.prune leaves them, fill `x` with their product. Values
    are converted to the dtype and device of the model as `load_state_dict` does it, also from and
    to int8; complex ones go into complex ones only. Batch normalisations that are folded in the
    file are folded in the model; sparse layers that are made compute the activations they do in the
    file, those that are there already are left with theirs.

    Args:
        model: A module with the layers of the saved one; changed in place.
        path: A file `save` wrote, any safetensors file of a state_dict, or a state_dict. Of the
            sparse layers of a state_dict dense models take those of format csr and block.
        strict: Whether names that only one side has are an error.
        dense: Whether dense layers stay dense.

    Returns:
        The names that did not match (both lists empty when strict).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or an index in it is invalid; path and reason are named. Or
            a dense weight has nonzeros where the sparse layer has no position.
        RuntimeError: Names or shapes do not match, as from `nn.Module.load_state_dict`.
    """
    _check_module("load", model)
    if not isinstance(path, str | os.PathLike | Mapping):
        raise TypeError(f"load: expected a path or a state_dict, got {type(path).__name__}")
    source = nullcontext(given(path)) if isinstance(path, Mapping) else opened(Path(path))
    with source as stored:
        with folded_like(model, stored.folded, stored.entries):
            return _fill(model, stored, strict, dense)


def _fill(model: nn.Module, stored: StoredFile, strict: bool, dense: bool) -> LoadedKeys:
    targets = targets_of(model)
    refuse_targets(stored.path, targets)
    join(stored, targets, partial(is_transposed, model))
    fitter = Fitter(model, stored, targets)
    keys = LoadedKeys(
        [name for name in targets if name not in fitter.matched] + _only_on_meta(model, targets),
        [name for name in (*stored.entries, *stored.aliases) if name not in targets],
    )
    _refuse_mismatches(model, stored, fitter, keys if strict else None)
    builder = Builder.find(model, fitter)
    if dense:
        builder.sites.clear()
    ready = {name: fitter.fitted(name) for name in fitter.matched if name not in builder.sites}
    builder.prepare()
    fitter.check_ties(ready)
    _write(model, fitter, ready)
    builder.put(model)
    return keys


def _check_module(op: str, model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected a torch.nn.Module, got {type(model).__name__}")


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict, dict, dict[str, str]]:
    """Tensors to write, descriptions of sparse and packed ones, names of what is there already."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict] = {}
    packed: dict[str, dict] = {}
    aliases: dict[str, str] = {}
    first: dict = {}
    for name, item in targets_of(model).items():
        original = first.setdefault(_identity(name, item), name)
        if original != name:
            aliases[name] = original
        elif isinstance(item, SparseWeight):
            layers[name], parts = encode(item)
            tensors.update({key_of(name, part): t for part, t in parts.items()})
        else:
            # A copy even if contiguous: two views of one storage would be refused.
            whole = item.detach().cpu().clone(memory_format=torch.contiguous_format)
            header, parts = pack_dense(whole) or (None, {})
            packed.update({name: header} if header else {})
            tensors.update({key_of(name, p): t for p, t in parts.items()} or {name: whole})
    return tensors, layers, packed, aliases


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


def _only_on_meta(model: nn.Module, targets) -> list[str]:
    """Buffers on the meta device that no file holds, so that nothing gives them content."""
    return [
        f"{name} (on the meta device, in no state_dict)"
        for prefix, module in model.named_modules()
        for own, buffer in module._buffers.items()
        if not isinstance(module, SparseWeight) and buffer is not None and buffer.is_meta
        if (name := key_of(prefix, own)) not in targets
    ]


def _refuse_mismatches(model, stored, fitter: Fitter, keys: LoadedKeys | None) -> None:
    """Raise one RuntimeError that lists unmatched keys (if given) and all wrong shapes."""
    problems = []
    if keys:
        named = ("Missing", keys.missing_keys), ("Unexpected", keys.unexpected_keys)
        problems += [f"{kind} key(s): {', '.join(map(repr, k))}." for kind, k in named if k]
    problems += fitter.size_faults()
    if problems:
        title = f"load: error(s) in loading {stored.path} for {type(model).__name__}:"
        raise RuntimeError("\n\t".join([title, *problems]))


@torch.no_grad()
def _write(model: nn.Module, fitter: Fitter, ready: dict[str, Content]) -> None:
    """Put checked contents into the model, one dense tensor at a time."""
    targets = fitter.targets
    for alias, name in fitter.stored.aliases.items():
        if alias in ready and name in ready and targets[alias] is not targets[name]:
            _tie(model, alias, targets[alias], targets[name])
    for name, content in ready.items():
        target = targets[name]
        if isinstance(target, SparseWeight):
            target.become(content)
            continue
        content = fitter.dense(name, content)
        if target.is_meta:
            _replace(model, targets, target, content.to("cpu", target.dtype, copy=True))
        else:
            overwrite(target, content)


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


def _replace(model: nn.Module, targets, old: Tensor, content: Tensor) -> None:
    """Let every name of a tensor on the meta device mean one with memory."""
    if isinstance(old, nn.Parameter):
        content = nn.Parameter(content.contiguous(), requires_grad=old.requires_grad)
    for name in [name for name, target in targets.items() if target is old]:
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        for table in (owner._parameters, owner._buffers):
            if table.get(attribute) is old:
                table[attribute] = content
