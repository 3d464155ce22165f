"""Sparse layers where a file has them, hung into a model that was built dense.

No timing and no dense memory: what the conversion decided, the file says. Activations that the
saved layers compute are fused again where the model has a module for them; all else that a
conversion does (pools, residual sums, paddings, parts of a batch) only makes a model faster and is
left as the model was built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .chain import Slot, is_hooked, slots
from .device import device_obstacle
from .fuse import FusedActivation, kind_of_activation
from .nn import SparseConv2d, SparseLinear
from .sites import ON_META, Site, find_sites, find_sparse, group_tied
from .storage_fit import Fitter
from .storage_read import key_of
from .weight_base import SparseWeight


def activations_of(model: nn.Module) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What a file says about activations: layer -> kind, and module they came from -> layers."""
    layers = {site.module: site for site in find_sparse(model)}
    kinds = {s.name: m.activation for m, s in layers.items() if m.activation != "none"}
    fused = {}
    for slot in slots(model, lambda m: isinstance(m, FusedActivation)):
        readers = slot.module.fused[1]
        if all(layer in layers for layer in readers):
            fused[slot.name] = [layers[layer].name for layer in readers]
    return kinds, fused


@dataclass
class Builder:
    """The layers of a model that become sparse.

    Attributes:
        sites: Names of their weights, each with the layer.
        weights: The sparse weights by the same names, once they are made.
        fitter: Makes them.
    """

    sites: dict[str, Site]
    weights: dict[str, SparseWeight]
    fitter: Fitter

    @classmethod
    def find(cls, model: nn.Module, fitter: Fitter) -> Builder:
        """Look for dense layers whose weights the file has as those of sparse layers."""
        sites: dict[str, Site] = {}
        names = _names_of_weights(model)
        for group in group_tied(find_sites(model)):
            found = {name: site for site in group for name in names[id(site.module)]}
            if all(site.places and _can_be_sparse(site) for site in group):
                own = {fitter.matched.get(name) for name in found}
                if len(own) == 1 and None not in own:
                    entry = fitter.stored.entries[own.pop()]
                    sites.update(found if entry.is_sparse else {})
        return cls(sites, {}, fitter)

    def prepare(self) -> None:
        """Make the weights; raises what the file is refused for, and changes nothing."""
        for name, site in self.sites.items():
            groups = getattr(site.module, "groups", 1)
            self.weights[name] = self.fitter.built(name, groups, site.module.weight)

    def put(self, model: nn.Module) -> None:
        """Hang the sparse layers in, with the biases that the dense ones have by now."""
        twins: dict[nn.Module, nn.Module] = {}
        for name, site in self.sites.items():
            if site.module not in twins:
                layer = SparseConv2d if site.kind == "Conv2d" else SparseLinear
                twins[site.module] = layer.from_weight(self.weights[name], site.module)
        by_name = {name.removesuffix(".weight"): twins[s.module] for name, s in self.sites.items()}
        unfused = self._fuse(model, by_name)
        for name, kind in self.fitter.stored.activations.items():
            if name in by_name and name not in unfused:
                by_name[name].activation = kind
        for site in self.sites.values():
            site.put(twins[site.module])

    def _fuse(self, model: nn.Module, by_name: dict[str, nn.Module]) -> set[str]:
        """Let layers compute activations as in the file; gives the layers that must not.

        All of them or none: a layer may serve several places, and a place several layers.
        """
        stored = self.fitter.stored
        places = {slot.name: slot for slot in slots(model, lambda m: True)}
        present = {name: layers for name, layers in stored.fused.items() if name in places}
        fits = _fits(by_name, stored.activations, places)
        if not all(fits(name, layers) for name, layers in present.items()):
            return {layer for layers in present.values() for layer in layers}
        for name, layers in present.items():
            readers = tuple(dict.fromkeys(by_name[layer] for layer in layers))
            places[name].put(FusedActivation(places[name].module, readers))
        return set()


def _can_be_sparse(site: Site) -> bool:
    if site.obstacle != ON_META:
        return not site.obstacle
    return not device_obstacle(
        torch.empty(0, dtype=site.module.weight.dtype)
    )  # it comes to the CPU


def _fits(by_name, kinds: dict[str, str], places: dict[str, Slot]) -> Callable:
    def fits(name: str, layers: list[str]) -> bool:
        module = places[name].module
        plain = not (module._parameters or module._buffers or module._modules or is_hooked(module))
        if not layers or not plain or not all(layer in by_name for layer in layers):
            return False
        dtype = by_name[layers[0]].weight.compute_dtype
        return {kinds.get(layer) for layer in layers} == {kind_of_activation(module, dtype)}

    return fits


def _names_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """Every name of the weight of every module, by the id of the module."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(key_of(name, "weight"))
    return names
