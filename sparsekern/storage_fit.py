"""Contents of a file in the form of what they go into; a model is read here, never changed."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .prune.targets import is_conv1d_of_transformers
from .storage_codec import Packed
from .storage_parts import Product, target_device
from .storage_read import StoredFile, key_of
from .weight_base import HINT, SparseWeight
from .weights import BlockWeight, NMWeight

Target = Tensor | SparseWeight
Content = Tensor | SparseWeight | Packed | Product


def targets_of(model: nn.Module) -> dict[str, Target]:
    """What a file can fill, by every name: sparse weights, all other parameters and buffers."""
    modules = model.named_modules(remove_duplicate=False)
    sparse = {name: module for name, module in modules if isinstance(module, SparseWeight)}
    covered = {key_of(name, part) for name, w in sparse.items() for part in (*w.parts, HINT)}
    state = model.state_dict(keep_vars=True)
    return {**{k: v for k, v in state.items() if k not in covered}, **sparse}


def refuse_targets(path, targets: dict[str, Target]) -> None:
    """Raise for what no file can fill: state that is no plain tensor, or is not made yet.

    Raises:
        TypeError: Something other than a tensor.
        ValueError: A lazy parameter, or one of which each rank holds a part.
    """
    for name, target in targets.items():
        values = target.values if isinstance(target, SparseWeight) else target
        if not isinstance(values, Tensor):
            got = type(values).__name__
            raise TypeError(f"load: {path}: expected {name!r} to be a tensor, got {got}")
        if fault := _oddity(values):
            raise ValueError(f"load: {path}: expected {name!r} to be a plain tensor, got {fault}")


def _oddity(values: Tensor) -> str:
    """What makes a tensor one that cannot be written, or an empty string."""
    if is_lazy(values):
        return "a lazy parameter without a shape"
    if hasattr(values, "device_mesh"):
        return "a DTensor, of which each rank holds a part"
    if values.layout != torch.strided:
        return f"one of layout {values.layout}"
    repeats = any(n > 1 and step == 0 for n, step in zip(values.shape, values.stride()))
    return "one that shares memory with itself" if repeats else ""


def is_transposed(model: nn.Module, name: str) -> bool:
    """Whether the dense form of the weight `name` is (in, out), as in transformers' Conv1D."""
    parent, _, attribute = name.rpartition(".")
    owner = model.get_submodule(parent)
    conv1d = getattr(owner, "transposed", False) is True or is_conv1d_of_transformers(owner)
    return conv1d and attribute == "weight"


class Fitter:
    """Reads entries and brings them in the form of targets, each of them once.

    Attributes:
        model: The model to fill; not changed.
        stored: The file.
        targets: What can be filled, by name.
        matched: Name of a target -> name of its entry.
    """

    def __init__(self, model: nn.Module, stored: StoredFile, targets: dict[str, Target]):
        self.model, self.stored, self.targets = model, stored, targets
        named = {name: stored.aliases.get(name, name) for name in targets}
        self.matched = {name: own for name, own in named.items() if own in stored.entries}
        self._read: dict[str, Content] = {}
        self._made: dict[tuple, SparseWeight] = {}

    def size_faults(self) -> list[str]:
        """Every target that has another shape than its entry."""
        faults = []
        for name, own in self.matched.items():
            entry, target = self.stored.entries[own], self.targets[name]
            found, wanted = entry.shape, tuple(target.shape)
            mixed = entry.is_sparse != isinstance(target, SparseWeight)
            if mixed and is_transposed(self.model, name):
                found = found[::-1]
            if found != wanted:
                sizes = f"{found} in the file, {wanted} in the model"
                faults.append(f"size mismatch for {name}: {sizes}.")
        return faults

    def read(self, name: str) -> Content:
        """The content for a target as the file has it; its shape was compared before."""
        own = self.matched[name]
        if own not in self._read:
            try:
                self._read[own] = self.stored.entries[own].read()
            except (ValueError, RuntimeError, TypeError) as error:
                path = self.stored.path
                raise ValueError(f"load: {path} is damaged: layer {own!r}: {error}") from error
        return self._read[own]

    def fitted(self, name: str) -> Content:
        """What goes into a target: for a sparse one a weight `SparseWeight.become` takes."""
        content, target = self.read(name), self.targets[name]
        if not _can_be_cast(content.dtype, target.dtype):
            raise self._refused(f"{name!r} as something to hold in {target.dtype}", content.dtype)
        if not isinstance(target, SparseWeight):
            return content
        key = id(target), self.matched[name]
        if key not in self._made:
            self._made[key] = self._sparse(name, target, content)
        return self._made[key]

    def dense(self, name: str, content: Content) -> Tensor:
        """The content of a dense target."""
        dense = _dense(content)
        turned = isinstance(content, SparseWeight) and is_transposed(self.model, name)
        return dense.t() if turned else dense

    def built(self, name: str, groups: int, like: Tensor) -> SparseWeight:
        """The sparse entry as a weight that takes the place of the dense one `like`."""
        own = self.matched[name]
        device = "cpu" if like.is_meta else like.device
        key = own, groups, like.dtype, device
        if key not in self._made:
            content = self.read(name)
            content.groups = groups
            parts = {part: getattr(content, part) for part in content.parts}
            try:
                weight = content.with_parts(parts, dtype=like.dtype, device=device)
            except (ValueError, RuntimeError) as error:
                raise self._refused(f"a weight {own!r} that a layer can hold", error) from error
            if weight.values.is_floating_point():
                weight.values.requires_grad_(like.requires_grad)
            self._made[key] = weight
        return self._made[key]

    @torch.no_grad()
    def _sparse(self, name: str, target: SparseWeight, content: Content) -> SparseWeight:
        try:
            if isinstance(content, SparseWeight):
                content = self._recast(target, content)
            else:
                dense = _dense(content)
                dense = dense.t() if is_transposed(self.model, name) else dense
                content = self._gather(name, target, dense)
            parts = {part: getattr(content, part) for part in content.parts}
            return target.with_parts(parts, content.pattern, device=target_device(target))
        except _NonzerosLost:
            raise
        except (ValueError, RuntimeError) as error:
            pattern = getattr(content, "pattern", "unknown, as it is dense")
            wanted = f"a weight {name!r} that fits format {target.format} of the sparse layer"
            raise self._refused(wanted, f"one of pattern {pattern} ({error})") from error

    def _recast(self, target: SparseWeight, entry: SparseWeight) -> SparseWeight:
        """The entry in the format of the target, if that can hold it."""
        if target.format == entry.format:
            return entry
        own = isinstance(target, (BlockWeight, NMWeight))
        pattern = target.pattern if own else entry.pattern
        return type(target).from_dense(entry.to_dense(), entry.mask(), pattern, target.groups)

    def _gather(self, name: str, weight: SparseWeight, dense: Tensor) -> SparseWeight:
        if weight.device.type == "meta":
            raise ValueError("a layer on the meta device has no positions to read it at")
        dense = dense.to(weight.device, weight.compute_dtype)
        values = weight.gather(dense).cpu()
        lost = int(dense.count_nonzero()) - int(values.count_nonzero())
        if lost:
            raise _NonzerosLost(
                f"load: {self.stored.path}: expected the dense weight {name!r} to be zero outside "
                f"the pattern of the sparse layer, got {lost} nonzeros there; prune it first or "
                "load into a dense model"
            )
        return weight.refilled(values)

    def check_ties(self, names) -> None:
        """ValueError where a target with several names would get two contents."""
        first: dict[int, str] = {}
        for name in names:
            original = first.setdefault(id(self.targets[name]), name)
            if self.matched[name] == self.matched[original]:
                continue
            if not _equal(self.fitted(name), self.fitted(original)):
                wanted = f"one content for {original!r} and {name!r}, which the model ties"
                raise self._refused(wanted, "two that differ")

    def _refused(self, wanted: str, got) -> ValueError:
        return ValueError(f"load: {self.stored.path}: expected {wanted}, got {got}")


class _NonzerosLost(ValueError):
    """A dense weight has more than the positions of a sparse layer can hold."""


def _dense(content: Content) -> Tensor:
    return content if isinstance(content, Tensor) else content.to_dense()


@cache
def _can_be_cast(there: torch.dtype, here: torch.dtype) -> bool:
    """Whether `copy_` can do it, as in load_state_dict; imaginary parts are not dropped."""
    if there.is_complex and not here.is_complex:
        return False
    try:
        torch.zeros(1, dtype=here).copy_(torch.zeros(1, dtype=there))
    except (RuntimeError, TypeError):
        return False
    return True


def _equal(a: Content, b: Content) -> bool:
    if isinstance(a, SparseWeight) and isinstance(b, SparseWeight) and a.parts == b.parts:
        return all(torch.equal(getattr(a, n), getattr(b, n)) for n in a.parts)
    return torch.equal(_dense(a), _dense(b))
