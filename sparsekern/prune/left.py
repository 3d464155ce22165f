"""What a pruning left as it was: every weight of a model that it did not look at, and why."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from ..weight_base import SparseWeight
from .computed import is_torch_masked
from .targets import Layer, is_adapter, is_conv1d_of_transformers, memory_key, unwrapped


@dataclass(frozen=True)
class LeftWeight:
    """A weight that was left as it is: a parameter of two dimensions or more.

    Attributes:
        name: Name of the layer, or of the parameter where it is not called `weight`.
        kind: Type of the module that holds it.
        shape: Its shape; of a sparse layer that of the dense weight.
        zeros: Weights that are exactly 0; none are counted on meta.
        total: All of its weights.
        reason: Why it was left.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    zeros: int
    total: int
    reason: str

    def to_dict(self) -> dict:
        """Give the row as plain values (ready for JSON)."""
        return {**asdict(self), "shape": list(self.shape)}


def find_left(
    model: nn.Module, layers: Iterable[Layer] = (), skipped: Mapping[str, str] | None = None
) -> tuple[LeftWeight, ...]:
    """List the parameters of two dimensions or more that belong to none of `layers`.

    A weight that several modules share counts once. A sparse layer counts as its dense weight.

    Args:
        model: Any module.
        layers: Layers that were looked at.
        skipped: Reasons by layer name, for layers that were considered.
    """
    model, skipped = unwrapped(model), skipped or {}
    seen = {id(layer.module.weight) for layer in layers if not layer.is_plain}
    seen |= {memory_key(layer.module.weight) for layer in layers if layer.is_plain}
    rows = []
    for name, module in model.named_modules():
        for full, own, weight in _weights_of(name, module):
            key = id(weight) if isinstance(weight, SparseWeight) else memory_key(weight)
            if key not in seen:
                seen.add(key)
                rows.append(_row(model, name, module, full, own, weight, skipped))
    return tuple(rows)


def all_reasons(skipped: Mapping[str, str], left: Sequence[LeftWeight]) -> dict[str, str]:
    """Reasons for everything that was left out, layers that were considered first."""

    def is_new(row: LeftWeight) -> bool:
        inside = (n for n in skipped if not n or row.name == n or row.name.startswith(f"{n}."))
        return not any(skipped[name] == row.reason for name in inside)

    return {**skipped, **{row.name: row.reason for row in left if is_new(row)}}


def name_found(left: Sequence[LeftWeight]) -> str:
    """Name the types of module that hold the weights left, and what to pass to prune them."""
    sizes: dict[str, int] = {}
    for row in left:
        sizes[row.kind] = sizes.get(row.kind, 0) + row.total
    if not sizes:
        return "the model holds no weight of two dimensions or more"
    found = ", ".join(f"{kind} ({total:,} weights)" for kind, total in sizes.items())
    kinds = [f"nn.{k}" for k in sizes if k in ("Linear", "Conv1d", "Conv2d", "Conv3d")]
    hint = f"pass targets={' or '.join(kinds)}" if kinds else "prune takes none of these"
    return f"found {found}; {hint}"


def _weights_of(name: str, module: nn.Module) -> Iterator[tuple[str, str, object]]:
    """Full name, own name and weight of everything a module itself holds."""
    sparse = module._modules.get("weight")
    if isinstance(sparse, SparseWeight):
        yield name, "weight", sparse
    if isinstance(module, SparseWeight):
        return
    for own, parameter in module._parameters.items():
        if parameter is None or isinstance(parameter, UninitializedTensorMixin):
            continue
        if parameter.ndim >= 2:
            yield (name if own == "weight" else f"{name}.{own}".lstrip(".")), own, parameter


def _row(model, name, module, full, own, weight, skipped) -> LeftWeight:
    kind = type(module).__name__
    if isinstance(weight, SparseWeight):
        shape = tuple(weight.shape)
        zeros = 0 if weight.values.is_meta else _zeros(weight.to_dense())
        reason = skipped.get(name) or f"is sparse already (format {weight.format})"
        return LeftWeight(full, kind, shape, zeros, weight.shape.numel(), reason)
    reason = _reason(model, name, module, own, skipped)
    held = weight
    if own == "weight_orig" and is_torch_masked(module):
        held = weight * module.weight_mask
    return LeftWeight(full, kind, tuple(weight.shape), _zeros(held), weight.numel(), reason)


def _target_kind(module: nn.Module) -> str | None:
    """Name of the type that `targets` takes for a module; None if there is none."""
    if is_conv1d_of_transformers(module):
        return "Linear"
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return next((kind.__name__ for kind in kinds if isinstance(module, kind)), None)


def _zeros(weight: Tensor) -> int:
    return 0 if weight.is_meta else weight.numel() - int(torch.count_nonzero(weight.detach()))


def _reason(model, name: str, module: nn.Module, own: str, skipped: Mapping[str, str]) -> str:
    owner = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name
    if name.startswith("parametrizations."):
        owner = ""
    if owner in skipped:
        return skipped[owner]
    if is_adapter(model, name):
        return "is an adapter, which stays as it is"
    kind = type(module).__name__
    if own == "weight" and (base := _target_kind(module)):
        return f"not among the targets; to prune it, add nn.{base} to targets"
    if ".parametrizations." in f".{name}":
        return "is part of a parametrization"
    return f"held by {kind}, which prune does not know (only linear layers and convolutions)"
