"""Entries that are put together without a manifest: state_dicts, and what torch prunes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .patterns import Block
from .storage_read import Entry, StoredFile, key_of
from .weight_base import HINT, SparseWeight
from .weights import BlockWeight, CSRWeight
from .weights_int8 import Int8BlockWeight, Int8CSRWeight


def given(state_dict: Mapping) -> StoredFile:
    """A state_dict as what a file holds."""
    entries = {}
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise TypeError(f"load: expected a state_dict with names, got {name!r} among them")
        if isinstance(value, Tensor) and not value.is_nested:
            entries[name] = Entry(tuple(value.shape), lambda n=name, v=value: _plain(n, v))
        else:
            raise TypeError(
                f"load: expected {name!r} of the state_dict to be a tensor, got "
                f"{type(value).__name__}"
            )
    return StoredFile("the state_dict", entries)


def _plain(name: str, value: Tensor) -> Tensor:
    if value.is_meta or value.layout != torch.strided or hasattr(value, "device_mesh"):
        got = "one on the meta device" if value.is_meta else value.layout
        raise ValueError(f"expected {name!r} to be a plain tensor with data, got {got}")
    return value.detach()


def join(stored: StoredFile, targets: Mapping, is_transposed: Callable[[str], bool]) -> None:
    """Make one entry of the parts of each target that has none.

    Args:
        stored: What is read; its entries change.
        targets: What is to be filled, by name.
        is_transposed: Whether a dense target is (in, out).
    """
    hints = [name for name in stored.entries if name.rpartition(".")[2] == HINT]
    for name in hints:
        stored.entries.pop(name)
    for name, target in targets.items():
        if name in stored.entries or name in stored.aliases:
            continue
        if name.rpartition(".")[0] in targets:  # a part of a weight, no weight
            continue
        shape = tuple(target.shape)
        turned = not isinstance(target, SparseWeight) and is_transposed(name)
        _join_sparse(stored, name, target, shape[::-1] if turned else shape)
        _join_pruned(stored, name, targets)


def _join_sparse(stored: StoredFile, name: str, target, shape: tuple[int, ...]) -> None:
    """`x` of `x.values` and its positions, as the state_dict of a sparse layer has them."""
    if len(shape) not in (2, 4):
        return
    own = (type(target),) if isinstance(target, SparseWeight) else ()
    for kind in dict.fromkeys((*own, *_READABLE)):
        keys = {part: key_of(name, part) for part in kind.parts}
        if not all(key in stored.entries for key in keys.values()):
            continue
        if "scales" not in kind.parts and key_of(name, "scales") in stored.entries:
            continue
        parts = {part: stored.entries.pop(key) for part, key in keys.items()}
        stored.entries[name] = Entry(shape, _reader(kind, parts, shape, target), is_sparse=True)
        return


_READABLE = (Int8CSRWeight, Int8BlockWeight, CSRWeight, BlockWeight)


def _reader(kind: type[SparseWeight], parts: dict[str, Entry], shape, target):
    def read() -> SparseWeight:
        tensors = {part: entry.read() for part, entry in parts.items()}
        if kind is type(target):
            return target.with_parts(tensors, device=target_device(target))
        pattern = "unstructured"
        if issubclass(kind, BlockWeight):
            sizes = tensors["values"].shape[1:]
            if len(sizes) != 2 or min(sizes) < 1:
                raise ValueError(f"expected values (n_blocks, R, C), got sizes {tuple(sizes)}")
            pattern = str(Block(*sizes))
        return kind(*tensors.values(), shape, pattern, plans=False)

    return read


def target_device(target: SparseWeight) -> torch.device:
    """Where a weight is to be: the CPU if it has no memory yet."""
    return torch.device("cpu") if target.device.type == "meta" else target.device


@dataclass(frozen=True)
class Product:
    """A weight and its mask, multiplied when wanted."""

    weight: object
    mask: object
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.weight.dtype

    def to_dense(self) -> Tensor:
        """The product, as torch.nn.utils.prune computes it."""
        weight, mask = (t if isinstance(t, Tensor) else t.to_dense() for t in self._both())
        return weight * mask.to(weight.dtype)

    def _both(self) -> tuple:
        return self.weight, self.mask


def _join_pruned(stored: StoredFile, name: str, targets: Mapping) -> None:
    """`x` of `x_orig` and `x_mask`; a model under torch.nn.utils.prune keeps them apart."""
    names = f"{name}_orig", f"{name}_mask"
    if name in stored.entries or any(n not in stored.entries or n in targets for n in names):
        return
    weight, mask = (stored.entries.pop(n) for n in names)

    def read() -> Product:
        found = weight.read(), mask.read()
        sparse = any(isinstance(t, SparseWeight) for t in found)
        if sparse or weight.shape != mask.shape or found[1].dtype.is_complex:
            raise ValueError(f"expected {names[0]} and {names[1]} to be dense and of one shape")
        return Product(*found, torch.Size(weight.shape))

    stored.entries[name] = Entry(weight.shape, read)
