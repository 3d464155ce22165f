"""Finds the layers of a model that can become sparse, and says why the others cannot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize

from ._load import _C
from .chain import is_hooked
from .device import device_obstacle
from .nn import SparseConv2d, SparseLinear
from .prune.slots import mask_beside
from .prune.targets import is_conv1d_of_transformers

WANTED = "nn.Linear, nn.Conv2d and transformers' Conv1D"
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
            return (
                f"its parent {type(parent).__name__} reads the weight itself and does not call the "
                "layer"
            )
    tied = [m for m in owners.get(id(module.weight), []) if m is not module]
    strangers = sorted({type(m).__name__ for m in tied if kind_of(m) != kind})
    if strangers:
        return f"its weight is tied to {', '.join(strangers)}"
    if module.weight.is_meta:
        return ON_META
    if module.weight.device.type == "cpu" and _C is None:
        return "the CPU kernels are not compiled, see `sparsekern doctor`"
    return device_obstacle(module.weight)


@dataclass(frozen=True)
class LeftOut:
    """A weight that no layer of a kind that can become sparse holds.

    Attributes:
        name: Name of the parameter in the model.
        kind: Class of the module that holds it.
        shape: Its shape.
        reason: Why it was not looked at.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str


def find_left_out(model: nn.Module) -> list[LeftOut]:
    """Every parameter of two dimensions and more outside of layers that are or can be sparse."""
    inside = {id(site.module) for site in (*find_sites(model), *find_sparse(model))}
    seen = {
        id(p)
        for m in model.modules()
        if id(m) in inside
        for p in m.parameters()
    }  # fmt: skip
    found = []
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or _dimensions(parameter) < 2:
                continue
            seen.add(id(parameter))
            kind, path = type(module).__name__, f"{name}.{attribute}" if name else attribute
            found.append(LeftOut(path, kind, tuple(parameter.shape), _why_left_out(module)))
    return found


def _dimensions(parameter: Tensor) -> int:
    return 0 if isinstance(parameter, UninitializedTensorMixin) else parameter.dim()


def _why_left_out(module: nn.Module) -> str:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "rows are looked up, not multiplied"
    if isinstance(module, nn.MultiheadAttention):
        return "the attention multiplies it itself"
    if type(module).__module__.startswith("torch.nn."):
        return "no sparse layer of this kind"
    return "a parameter of a module of its own kind"


def what_is_there(model: nn.Module) -> str:
    """What a model without a dense layer that can become sparse holds instead, in a few words."""
    sparse = len(find_sparse(model))
    if sparse:
        return f"one with {sparse} layers that are sparse already"
    left_out = find_left_out(model)
    if not left_out:
        return "one with none"
    kinds = Counter(weight.kind for weight in left_out)
    weights = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    return f"one with none, only weights without a sparse layer: {weights} (there are for {WANTED})"


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
