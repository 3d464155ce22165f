"""The way back: a converted model as a dense one."""

from __future__ import annotations

from torch import nn

from .blocks import restore_blocks
from .chain import slots
from .conversion import REPORT
from .fuse import FusedActivation
from .norm import ContiguousBatchNorm2d, restore_norms
from .parts import restore_whole_batches
from .pool import restore_pools
from .sites import find_sparse


def to_dense(model: nn.Module) -> nn.Module:
    """Swap every sparse layer back for its dense twin, with the same weights and zeros.

    In place; returns the model, or the dense layer if the model is a single sparse one. Activations
    that `convert_to_sparse` fused into layers are modules again where they were. Normalisations it
    folded stay folded: the dense model is the one `fold_batchnorm` gives. Convert with `fuse=False`
    where the weights must come back bit for bit.
    """
    result = model
    restored = _restore_activations(model)
    restore_pools(model)
    restore_norms(model, restored)
    restore_blocks(model)
    restore_whole_batches(model)
    tied: dict[int, nn.Parameter] = {}
    for site in find_sparse(model):
        dense = site.module.to_dense()
        inner = dense[0] if isinstance(dense, nn.Sequential) else dense
        inner.weight = tied.setdefault(id(site.module.weight), inner.weight)
        if site.module in restored:
            dense = inner
        site.put(dense)
        if site.module is model:
            result = dense
    if REPORT in model.__dict__:
        object.__delattr__(model, REPORT)
    return result


def _restore_activations(model: nn.Module) -> set[nn.Module]:
    """Put fused activations back; returns the layers that no longer have to compute them."""
    present = {site.module for site in find_sparse(model)}
    present |= {m for m in model.modules() if isinstance(m, ContiguousBatchNorm2d)}
    places = slots(model, lambda m: isinstance(m, FusedActivation))
    # A layer may serve several places, and a place be served by a layer that is gone: then all of
    # them stay fused, and the dense twin of the layer brings the activation along.
    lost = {la for s in places for la in s.module.fused[1] if not set(s.module.fused[1]) <= present}
    found = len(lost) + 1
    while found != len(lost):
        found = len(lost)
        lost |= {la for s in places for la in s.module.fused[1] if lost & set(s.module.fused[1])}
    restored: set[nn.Module] = set()
    for slot in places:
        activation, layers = slot.module.fused
        if not lost & set(layers):
            slot.put(activation.train(slot.module.training))
            restored.update(layers)
    return restored
