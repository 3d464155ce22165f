"""Finding the weights to prune: each tied or shared weight once, with every name it goes by."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.conv import _ConvTransposeNd as _Transposed
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedTensorMixin

from ..patterns import Pattern
from ..weight_base import SparseWeight
from .computed import why_computed, why_not_multiplied


@dataclass(frozen=True)
class Layer:
    """A prunable weight: the module that holds it, its name, and the other names of the weight.

    Attributes:
        alive: None, or the weights that earlier prunings left, boolean `(out, in, *kernel)`.
        note: What a report should say of the layer.
    """

    name: str
    module: nn.Module
    aliases: tuple[str, ...] = ()
    alive: Tensor | None = field(default=None, compare=False)
    note: str = ""

    @property
    def is_plain(self) -> bool:
        """False for a sparse layer, which can be looked at and not be pruned."""
        return not isinstance(self.module.weight, SparseWeight)

    @property
    def weight(self) -> Tensor:
        """The weight as `(out, in, *kernel)`, sharing memory with the parameter.

        Of a sparse layer a dense copy.
        """
        if not self.is_plain:
            return self.module.weight.to_dense().detach()
        return self.oriented(self.module.weight.detach())

    def oriented(self, tensor: Tensor) -> Tensor:
        """Turn the parameter's layout into `(out, in, *kernel)`, or back."""
        return tensor.t() if is_conv1d_of_transformers(self.module) else tensor

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for a linear layer."""
        return getattr(self.module, "groups", 1)


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """True for transformers' `Conv1D`, a linear layer whose weight is `(in, out)`.

    Told by its name, so that transformers need not be imported.
    """
    named = any(base.__name__ == "Conv1D" for base in type(module).__mro__)
    return named and hasattr(module, "nf")


def unwrapped(model: nn.Module) -> nn.Module:
    """Give the model inside of a `DistributedDataParallel`, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def parameters_of(model: nn.Module, layer: Layer) -> list[nn.Parameter]:
    """List the parameters over a layer's memory: its own, and others tied to it by memory alone."""
    own = layer.module.weight
    key = memory_key(own)
    return [own] + [
        p
        for p in model.parameters()
        if p is not own and p.shape == own.shape and memory_key(p) == key
    ]


def find_layers(
    model, targets, ignore, pattern: Pattern, sparse: bool = False
) -> tuple[list[Layer], dict[str, str]]:
    """List the weights to prune, all checked, and the layers left out.

    `ignore` counts before any check of a weight. `sparse` lists the sparse layers of a converted
    model, too; they can be looked at and not be pruned.

    Returns:
        The layers in module order, and for each left-out name the reason.

    Raises:
        TypeError: `model`, `targets` or `ignore` of a wrong type.
        ValueError: No layer left, an `ignore` entry that matches nothing, or a weight that cannot
            be pruned (on meta, not floating point, NaN or Inf, lazy, or sharded).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prune: expected a torch.nn.Module, got {type(model).__name__}")
    kinds = _check_targets(targets)
    entries = check_ignore(model, ignore)
    _refuse_shards(model, entries)
    owners = _owners(model)
    layers, skipped, seen = [], {}, set()
    for name, module in model.named_modules():
        if sparse and _is_sparse_target(module, kinds):
            if any(ignores(entry, name, module) for entry in entries):
                skipped[name] = "ignored"
            else:
                layers.append(Layer(name, module))
        if not _is_target(module, kinds):
            continue
        if reason := _reason_before_checks(model, name, module, entries):
            skipped[name] = reason
            continue
        key = _weight_key(name, module)
        if key in seen:
            continue
        seen.add(key)
        names = [name, *(other for other, _ in owners.get(key, []) if other != name)]
        reason = _reason_to_skip(name, module, owners.get(key, []), entries, pattern)
        note = ""
        if not reason:
            reason, note = why_not_multiplied(module)
        if reason:
            skipped[name] = reason
        else:
            layers.append(Layer(name, module, tuple(names[1:]), note=note))
    if not layers:
        _refuse_none(model, kinds, skipped)
    return layers, skipped


@contextmanager
def restored_on_error(layers: Iterable[Layer]) -> Iterator[None]:
    """Put the weights back if anything fails or the user interrupts (keeps one copy of them)."""
    before = [(layer.weight, layer.weight.clone()) for layer in layers]
    try:
        yield
    except BaseException:
        for weight, copy in before:
            weight.copy_(copy)
        raise


def _refuse_shards(model: nn.Module, entries: list) -> None:
    """Refuse weights of which each rank holds a part: a mask needs the whole.

    Told by the marks that FSDP leaves, so that torch.distributed.fsdp need not be imported. Both
    of its forms can leave a weight as a flat or an empty one on some ranks.
    """
    for name, module in model.named_modules():
        if any(ignores(entry, name, module) for entry in entries):
            continue
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__):
            _refuse_shard(name or "(model)", "FullyShardedDataParallel")
        for own, parameter in module._parameters.items():
            full = f"{name}.{own}" if name else own
            if hasattr(parameter, "device_mesh"):
                _refuse_shard(full, "a DTensor, as fully_shard makes")
            if hasattr(parameter, "_fsdp_flattened") or hasattr(parameter, "_is_flat_param"):
                _refuse_shard(full, "a part of FullyShardedDataParallel's flat parameter")


def _refuse_shard(name: str, got: str) -> None:
    raise ValueError(
        f"prune: expected whole weights on every rank, got {name!r}: {got} (FSDP is not supported; "
        "prune before sharding, or train with DistributedDataParallel)"
    )


def _check_targets(targets) -> tuple[type, ...]:
    kinds = targets if isinstance(targets, tuple | list) else (targets,)
    for kind in kinds:
        known = isinstance(kind, type) and issubclass(kind, (nn.Linear, _ConvNd))
        if not known or issubclass(kind, _Transposed):
            got = getattr(kind, "__name__", repr(kind))
            raise TypeError(
                f"prune: expected targets to be nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d or "
                f"subclasses of them, got {got}"
            )
    return tuple(kinds)


def _is_target(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    if is_conv1d_of_transformers(module):
        return any(issubclass(nn.Linear, kind) for kind in kinds)
    return isinstance(module, kinds)


def _is_sparse_target(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    weight = module._modules.get("weight")
    dense = nn.Linear if len(getattr(weight, "shape", ())) == 2 else nn.Conv2d
    return isinstance(weight, SparseWeight) and any(issubclass(dense, kind) for kind in kinds)


def is_adapter(model: nn.Module, name: str) -> bool:
    """True for what PEFT hangs beside a layer (LoRA and its like), told by names alone."""
    parts = name.split(".")
    if any(part.lower().startswith("lora_") for part in parts):
        return True
    for end in range(len(parts)):
        around = model.get_submodule(".".join(parts[:end]))
        if any(base.__name__ == "BaseTunerLayer" for base in type(around).__mro__):
            return parts[end] != "base_layer"
    return False


def _reason_before_checks(model, name: str, module: nn.Module, entries: list) -> str | None:
    if any(ignores(entry, name, module) for entry in entries):
        return "ignored"
    if is_adapter(model, name):
        return "is an adapter, which stays as it is"
    return why_computed(module)


def _weight_key(name: str, module: nn.Module):
    weight = module._parameters["weight"]
    if isinstance(weight, UninitializedTensorMixin):
        raise ValueError(f"prune: expected layer {name!r} to be initialized, got a lazy weight")
    return memory_key(weight)


def memory_key(weight: Tensor):
    """Tell weights apart: tied ones are one parameter, or two parameters over the same memory."""
    if weight.is_meta or weight.numel() == 0:
        return id(weight)
    return weight.device, weight.data_ptr(), weight.numel()


def _owners(model: nn.Module) -> dict:
    owners: dict = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None and not isinstance(parameter, UninitializedTensorMixin):
                owners.setdefault(memory_key(parameter), []).append((name, module))
    return owners


def check_ignore(model: nn.Module, ignore) -> list:
    """List the entries of `ignore`, each of which must match a module.

    Raises:
        TypeError: An entry that is neither a name, a glob nor a type.
        ValueError: An entry that matches nothing.
    """
    entries = list(ignore) if isinstance(ignore, tuple | list | set) else [ignore]
    modules = list(model.named_modules(remove_duplicate=False))
    for entry in entries:
        if not isinstance(entry, str | type):
            raise TypeError(f"prune: expected ignore to hold names, globs or types, got {entry!r}")
        if not any(ignores(entry, name, module) for name, module in modules):
            raise ValueError(f"prune: expected ignore to match a module, got {entry!r}")
    return entries


def ignores(entry, name: str, module: nn.Module) -> bool:
    """Say whether an entry of `ignore` means a module."""
    if isinstance(entry, type):
        return isinstance(module, entry)
    return name_matches(entry, name)


def name_matches(entry: str, name: str) -> bool:
    """True if a layer is meant: by its name, by a glob, or by the name of a module around it."""
    return fnmatchcase(name, entry) or bool(entry and name.startswith(entry + "."))


def _reason_to_skip(name, module, owners, entries, pattern) -> str | None:
    for entry in entries:
        hit = next((o for o, m in [(name, module), *owners] if ignores(entry, o, m)), None)
        if hit is not None:
            return "ignored" if hit == name else f"shares its weight with {hit!r}, which is ignored"
    weight = Layer(name, module).weight
    if weight.numel() == 0:
        return "has no weights"
    if reason := pattern.misfit(weight.shape):
        return f"pattern {pattern} {reason}"
    _check_values(name, weight)
    return None


def _check_values(name: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise ValueError(f"prune: expected the weight of layer {name!r} to hold data, got meta")
    if not weight.is_floating_point():
        got = f"{weight.dtype}"
        raise ValueError(f"prune: expected layer {name!r} to be floating point, got {got}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"prune: expected finite weights in layer {name!r}, got NaN or Inf")


def _refuse_none(model: nn.Module, kinds: tuple[type, ...], skipped: dict[str, str]) -> None:
    from .left import find_left, name_found  # it needs Layer from here

    got = "; ".join(f"{name!r} {reason}" for name, reason in skipped.items())
    if not got:
        names = ", ".join(kind.__name__ for kind in kinds)
        got = f"none of the target types ({names}); {name_found(find_left(model))}"
    raise ValueError(f"prune: expected a model with a prunable layer, got {got}")
