"""Fold batch normalisation into the layer before it, for inference."""

from __future__ import annotations

from collections import Counter, OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chain import Slot, is_hooked, shallow_copy, slots, trace
from .measure.structure import check_inputs

# Convolution or linear layer -> the normalisation that fits, and dimensions of its input. nn.Linear
# takes more dimensions than two; BatchNorm1d would then normalise another one than the last.
FITTING = {
    nn.Linear: (nn.BatchNorm1d, 2),
    nn.Conv1d: (nn.BatchNorm1d, 3),
    nn.Conv2d: (nn.BatchNorm2d, 4),
    nn.Conv3d: (nn.BatchNorm3d, 5),
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FoldedNorm(nn.Identity):
    """Stands where a batch normalisation was that the layer before it computes now."""


class FoldedNormAct(nn.Sequential):
    """Stands where a normalisation with an activation inside was; keeps the activation."""


def stand_in(norm: nn.Module) -> FoldedNorm | FoldedNormAct:
    """What takes the place of a normalisation once it is folded."""
    if type(norm) in NORMS:
        return FoldedNorm().train(norm.training)
    behind = {name: child for name, child in norm._modules.items() if child is not None}
    if not behind:
        return FoldedNorm().train(norm.training)
    return FoldedNormAct(OrderedDict(behind)).train(norm.training)


def strange_norms(model: nn.Module) -> list[str]:
    """Names of batch normalisations of other classes that compute something else, too."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, NORMS) and not _is_norm(module) and not is_hooked(module)
    ]


def fold_batchnorm(model: nn.Module, example_inputs) -> list[str]:
    """Fold every batch normalisation that directly follows a convolution or linear layer.

    Between layers whose weights are sparse, reading and writing activations is a large part of what
    is left; a folded normalisation costs nothing. Exact up to rounding, in eval mode: w' = w g /
    sqrt(var + eps), b' = (b - mean) g / sqrt(var + eps) + beta (Ioffe & Szegedy 2015, algorithm 2),
    computed in float64. Zeros stay zeros. `convert_to_sparse` does this by itself; call it on the
    dense model when you compare, or when the folded dense model is what you want.

    A pair is folded only where, in a run of `example_inputs`, nothing else read the output of the
    layer or kept it, each was called once, neither has hooks, and the weight is a plain parameter
    of this layer alone. A model that takes another path for other inputs must not be folded.

    Args:
        model: In eval mode; changed in place. Folded normalisations become an nn.Identity.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments.

    Returns:
        Names of the folded normalisations.

    Raises:
        ValueError: the model or a part of it is in training mode, where normalisation depends on
            the batch.
    """
    training = training_part(model)
    if training is not None:
        what = f"{training!r} in training mode" if training else "one in training mode"
        raise ValueError(f"fold_batchnorm: expected a model in eval mode, got {what}")
    check_inputs(example_inputs, "fold_batchnorm")
    folded = []
    for layer, norm, weight, bias in find_folds(model, example_inputs):
        layer.weight, layer.bias = weight, bias
        for slot in slots(model, lambda m, norm=norm: m is norm):
            slot.put(stand_in(norm))
            folded.append(slot.name)
    return folded


def training_part(model: nn.Module) -> str | None:
    """Name of the first module in training mode, None when all are in eval mode."""
    return next((name for name, module in model.named_modules() if module.training), None)


def find_folds(model: nn.Module, inputs) -> list[tuple[nn.Module, nn.Module, Tensor, Tensor]]:
    """Every (layer, normalisation, folded weight, folded bias); the model is not changed."""
    owners = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    layers = slots(model, lambda m: _is_plain_layer(m, owners))
    norms = slots(model, _is_plain_norm)
    if not layers or not norms:
        return []
    links = trace(model, inputs, layers, norms)
    calls = links.calls()
    folds = []
    for slot, read_by in links.outputs.items():
        norm_slot = read_by[0]
        if norm_slot is None or not _fits(slot, norm_slot, links.dims[slot]):
            continue
        layer, norm = slot.module, norm_slot.module
        # What is called twice serves two places with one set of weights.
        once = calls[id(layer)] == calls[id(norm)] == 1
        if once and not {id(layer), id(norm)} & links.unsafe:
            weight, bias = _folded(layer, norm)
            if bool(weight.isfinite().all()) and bool(bias.isfinite().all()):
                folds.append((layer, norm, weight, bias))
    return folds


def with_parameters(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy of a layer with other parameters; the layer itself stays as it is."""
    twin = shallow_copy(layer)
    twin._parameters.update(weight=weight, bias=bias)
    return twin


def _is_plain_layer(module: nn.Module, owners: Counter[int]) -> bool:
    if type(module) not in FITTING or is_hooked(module):
        return False
    weight = module._parameters.get("weight")  # absent when it is computed (prune, weight_norm)
    return weight is not None and owners[id(weight)] == 1 and weight.is_floating_point()


def _is_plain_norm(module: nn.Module) -> bool:
    if not isinstance(module, NORMS) or module.running_mean is None or is_hooked(module):
        return False
    return _is_norm(module)


def _is_norm(module: nn.Module) -> bool:
    """Whether a batch normalisation, of whatever class, is one and then its children in turn.

    Libraries have normalisations with an activation inside (timm's BatchNormAct2d). Such a class is
    told by its values on a probe, not by its name; the probe is in eval mode.
    """
    if type(module) in NORMS:
        return True
    children = [child for child in module._modules.values() if child is not None]
    tensors = [t for child in children for t in (*child.parameters(), *child.buffers())]
    if tensors or any(is_hooked(m) for child in children for m in child.modules()):
        return False
    x = _probe(module)
    try:
        with torch.no_grad():
            options = module.running_mean, module.running_var, module.weight, module.bias
            want, got = module(x.clone()), F.batch_norm(x, *options, eps=module.eps)
            for child in children:
                got = child(got)
        return bool(torch.allclose(want, got, rtol=1e-5, atol=1e-6))
    except Exception:  # it takes other inputs, or its children do
        return False


def _probe(norm: nn.Module) -> Tensor:
    """An input whose channels are, normalised, from -12 to 12."""
    mean = norm.running_mean
    dims = next(dims for kind, dims in FITTING.values() if isinstance(norm, kind))
    x = torch.linspace(-12, 12, 49, device=mean.device, dtype=mean.dtype)
    channels = (1, -1, *[1] * (dims - 2))
    x = x.reshape(-1, *[1] * (dims - 1))
    return x * norm.running_var.sqrt().reshape(channels) + mean.reshape(channels)


def _fits(slot: Slot, norm_slot: Slot, dims: int) -> bool:
    kind, wanted = FITTING[type(slot.module)]
    return (
        isinstance(norm_slot.module, kind)
        and dims == wanted
        and slot.module.weight.shape[0] == norm_slot.module.num_features
    )


@torch.no_grad()
def _folded(layer: nn.Module, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    weight, bias = layer.weight, layer.bias
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    scaled = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return (
        nn.Parameter(scaled.to(weight.dtype), weight.requires_grad),
        nn.Parameter(shift.to(weight.dtype), weight.requires_grad),
    )
