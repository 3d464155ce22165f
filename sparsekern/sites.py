"""Finds the layers of a model that can become sparse, and says why the others cannot."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._load import _C
from .chain import is_hooked
from .device import device_obstacle
from .nn import SparseConv2d, SparseLinear
from .prune.slots import mask_beside
from .prune.targets import is_conv1d_of_transformers

ON_META = "its weight is on the meta device"
# The parent reads `child.weight` itself instead of calling the child.
READS_WEIGHT = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass
class Site:
    """One layer, wherever it hangs in the model.

    Attributes:
        name: First name of the layer in the model.
        module: The layer.
        kind: `Linear`, `Conv2d` or `Conv1D` (transformers' linear with a transposed weight).
        places: Every (parent, attribute) that refers to it; empty when it is the model itself.
        obstacle: Why it must stay dense, or an empty string.
    """

    name: str
    module: nn.Module
    kind: str
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    obstacle: str = ""

    @property
    def weight(self) -> Tensor:
        """The weight as (out, in, ...); a view."""
        weight = self.module.weight.detach()
        return weight.t() if self.kind == "Conv1D" else weight

    @property
    def mask(self) -> Tensor | None:
        """The mask that a Pruner put beside the weight, as (out, in, ...); None without one."""
        mask = mask_beside(self.module)
        return mask.t() if mask is not None and self.kind == "Conv1D" else mask

    @property
    def is_depthwise(self) -> bool:
        """A convolution of groups of one input channel."""
        conv = self.module
        return self.kind == "Conv2d" and conv.groups == conv.in_channels and conv.groups > 1

    def put(self, module: nn.Module) -> None:
        """Hang `module` where the layer was."""
        for parent, attribute in self.places:
            parent._modules[attribute] = module


def kind_of(module: nn.Module) -> str | None:
    """What sort of layer this is, None when it is none that can become sparse."""
    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, nn.Conv2d):
        return "Conv2d"
    return "Conv1D" if is_conv1d_of_transformers(module) else None


def find_sites(model: nn.Module) -> list[Site]:
    """All dense linear and convolution layers of a model, each once, in order."""
    sites: dict[int, Site] = {}
    parents: dict[int, list] = {}
    for parent_name, parent in model.named_modules():
        for attribute, child in _children(parent):
            parents.setdefault(id(child), []).append((parent, attribute))
            if id(child) not in sites and kind_of(child):
                name = f"{parent_name}.{attribute}" if parent_name else attribute
                sites[id(child)] = Site(name, child, kind_of(child))
    if kind_of(model):
        sites = {id(model): Site("", model, kind_of(model))}
    owners = _weight_owners(model)
    for key, site in sites.items():
        site.places = parents.get(key, [])
        site.obstacle = _obstacle(site, owners)
    return list(sites.values())


def _children(parent: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every (attribute, child), also where a child hangs twice, unlike named_children."""
    return [(name, child) for name, child in parent._modules.items() if child is not None]


def _weight_owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return owners


def _obstacle(site: Site, owners) -> str:
    module, kind = site.module, site.kind
    base = {"Linear": nn.Linear, "Conv2d": nn.Conv2d}.get(kind)
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return (
            "its weight is computed (parametrisation or torch.nn.utils.prune); make it plain first"
        )
    if base and type(module).forward is not base.forward:
        return f"its class {type(module).__name__} has a forward of its own"
    if is_hooked(module):
        return "it has hooks or a patched forward, which a new layer would lose"
    for parent, _ in site.places:
        if isinstance(parent, READS_WEIGHT):
            return f"its parent {type(parent).__name__} reads the weight directly"
    tied = [m for m in owners.get(id(module.weight), []) if m is not module]
    strangers = sorted({type(m).__name__ for m in tied if kind_of(m) != kind})
    if strangers:
        return f"its weight is tied to {', '.join(strangers)}"
    if module.weight.is_meta:
        return ON_META
    if module.weight.device.type == "cpu" and _C is None:
        return "the CPU kernels are not compiled, see `sparsekern doctor`"
    return device_obstacle(module.weight)


def group_tied(sites: list[Site]) -> list[list[Site]]:
    """Sites in groups that share one weight; most groups hold one site."""
    groups: dict[int, list[Site]] = {}
    for site in sites:
        groups.setdefault(id(site.module.weight), []).append(site)
    return list(groups.values())


def find_sparse(model: nn.Module) -> list[Site]:
    """All sparse layers of a model, each once, with every place they hang."""
    sites: dict[int, Site] = {}
    for parent_name, parent in model.named_modules():
        for attribute, child in _children(parent):
            if isinstance(child, (SparseLinear, SparseConv2d)):
                name = f"{parent_name}.{attribute}" if parent_name else attribute
                site = sites.setdefault(id(child), Site(name, child, type(child).__name__))
                site.places.append((parent, attribute))
    if isinstance(model, (SparseLinear, SparseConv2d)):
        return [Site("", model, type(model).__name__)]
    return list(sites.values())
