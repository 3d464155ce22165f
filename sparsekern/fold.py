"""Fold batch normalisation into the layer before it, for inference."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .measure.structure import check_inputs, forward_call

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_batchnorm(model: nn.Module, example_inputs) -> list[str]:
    """Fold every batch normalisation that directly follows a convolution or linear layer.

    Between layers whose weights are sparse, reading and writing activations is a large part of what
    is left; a folded normalisation costs nothing. Exact up to rounding, in eval mode: w' = w g /
    sqrt(var + eps), b' = (b - mean) g / sqrt(var + eps) + beta (Ioffe & Szegedy 2015, algorithm 2).
    Zeros stay zeros. Call it before `convert_to_sparse`; when you compare, on the dense model too.

    A pair is folded only where, in a run of `example_inputs`, nothing else read the output of the
    layer. A model that takes another path for other inputs must not be folded.

    Args:
        model: In eval mode; changed in place. Folded normalisations become nn.Identity.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        Names of the folded normalisations.

    Raises:
        ValueError: the model is in training mode, where normalisation depends on the batch.
    """
    if model.training:
        raise ValueError("fold_batchnorm: expected a model in eval mode, got one in training mode")
    check_inputs(example_inputs, "fold_batchnorm")
    pairs = _find_pairs(model, example_inputs)
    places = _places(model)
    folded = []
    for layer, norm in pairs:
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        fused = fuse(layer, norm)
        layer.weight, layer.bias = fused.weight, fused.bias
        for parent, attribute, name in places[norm]:
            setattr(parent, attribute, nn.Identity())
            folded.append(name)
    return folded


class _Readers(TorchFunctionMode):
    """Counts how often each tensor is an argument of a torch function."""

    def __init__(self):
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Asking for a shape or dtype reads no element.
        if getattr(function, "__name__", "") not in ("__get__", "size", "dim", "shape"):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.count[id(leaf)] += 1
        return function(*args, **kwargs)


def _find_pairs(model: nn.Module, inputs) -> list[tuple[nn.Module, nn.Module]]:
    made: dict[int, nn.Module] = {}  # id of an output -> the layer
    followed: dict[nn.Module, list] = {}  # normalisation -> (layer or None, id of its input)
    alive: list[Tensor] = []  # ids must not be used twice
    calls: Counter[nn.Module] = Counter()
    readers = _Readers()

    def after_layer(module, args, output):
        calls[module] += 1
        made[id(output)] = module
        readers.count[id(output)] = 0  # an earlier tensor may have had this id
        alive.append(output)

    def before_norm(module, args):
        calls[module] += 1
        alive.append(args[0])
        followed.setdefault(module, []).append((made.get(id(args[0])), id(args[0])))

    hooks = []
    for module in model.modules():
        if type(module) in (*CONVS, nn.Linear):
            hooks.append(module.register_forward_hook(after_layer))
        elif type(module) in NORMS and module.track_running_stats and module.affine:
            hooks.append(module.register_forward_pre_hook(before_norm))
    try:
        with torch.no_grad(), readers:
            output = forward_call(model, inputs)()
    finally:
        for hook in hooks:
            hook.remove()
    returned = {id(leaf) for leaf in tree_leaves(output)}
    pairs = []
    for norm, seen in followed.items():
        layer, tensor = seen[0]
        alone = readers.count[tensor] == 1 and tensor not in returned
        # A layer or normalisation that is called twice serves two places with one set of weights.
        if layer is not None and alone and calls[layer] == calls[norm] == 1 and _fits(layer, norm):
            pairs.append((layer, norm))
    return pairs


def _fits(layer: nn.Module, norm: nn.Module) -> bool:
    features = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    kind = {nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}.get(type(layer), nn.BatchNorm1d)
    return features == norm.num_features and type(norm) is kind


def _places(model: nn.Module) -> dict[nn.Module, list]:
    places: dict[nn.Module, list] = {}
    for parent_name, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if isinstance(child, NORMS):
                name = f"{parent_name}.{attribute}" if parent_name else attribute
                places.setdefault(child, []).append((parent, attribute, name))
    return places
