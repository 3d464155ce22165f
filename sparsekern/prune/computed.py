"""Layers that multiply by another weight than the parameter that they hold."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = (
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "convolution",
    "mkldnn_linear", "_convolution",
)  # fmt: skip


def why_computed(module: nn.Module) -> str | None:
    """Say how the weight of a layer comes about if it is no plain parameter; None if it is."""
    if parametrize.is_parametrized(module, "weight"):
        kinds = ", ".join(type(p).__name__ for p in module.parametrizations["weight"])
        return (
            f"its weight is computed by a parametrization ({kinds}); first call "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    if module._parameters.get("weight") is not None:
        return None
    if is_torch_masked(module):
        return (
            "its weight is masked by torch.nn.utils.prune; first call "
            "torch.nn.utils.prune.remove(layer, 'weight')"
        )
    if "weight_g" in module._parameters:
        return "its weight is computed by weight_norm; first call remove_weight_norm(layer)"
    if "weight_orig" in module._parameters:
        return "its weight is computed by spectral_norm; first call remove_spectral_norm(layer)"
    return "its weight is no plain parameter"


def is_torch_masked(module: nn.Module) -> bool:
    """True if torch.nn.utils.prune masks the weight."""
    return "weight_orig" in module._parameters and "weight_mask" in module._buffers


def why_not_multiplied(module: nn.Module) -> tuple[str | None, str]:
    """Try whether zeros of a layer's weight are zeros in what its forward multiplies by.

    Only a subclass with a forward of its own can differ (weight standardisation, say). A copy of it
    runs once on a small input, with a weight that is 0 at every other place.

    Returns:
        The reason why not, or None; and a note where the forward could not be followed.
    """
    cls = type(module)
    if cls.forward in _plain_forwards(cls) or not isinstance(module, nn.Linear | _ConvNd):
        return None, ""
    unclear = (
        f"{cls.__name__} has a forward of its own, which could not be followed: "
        "see that it multiplies by its weight as it is"
    )
    try:
        watch = _run_probe(module)
    except Exception:
        return None, unclear
    if watch.kept is None:
        return None, unclear
    if watch.kept:
        return None, ""
    return f"{cls.__name__} computes its weight in forward, and zeros do not survive that", ""


def _plain_forwards(cls: type) -> list:
    return [
        base.__dict__["forward"]
        for base in cls.__mro__
        if base.__module__.startswith("torch.nn.modules") and "forward" in base.__dict__
    ]


def _run_probe(module: nn.Module) -> "_Watch":
    weight = module.weight
    values = torch.linspace(0.5, 1.5, weight.numel(), device=weight.device)
    values[::2] = 0
    probe = nn.Parameter(values.view(weight.shape).to(weight.dtype), requires_grad=False)
    twin = copy.deepcopy(module, {id(weight): probe}).eval()
    watch = _Watch(probe)
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        for parameter in twin.parameters():
            # What is added to the weight may be 0 so far, as in LoRA.
            if parameter is not probe and parameter.is_floating_point():
                parameter.uniform_(0.5, 1.5)
        x = _small_input(module, weight)
        with watch:
            type(module).forward(twin, x)
    return watch


def _small_input(module: nn.Module, weight: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        # A batch that is no dimension of the weight, so that input and weight differ in shape.
        rows = next(n for n in (2, 3, 5) if n not in weight.shape)
        return torch.rand(rows, module.in_features, device=weight.device, dtype=weight.dtype)
    reach = [d * (k - 1) + 3 for k, d in zip(module.kernel_size, module.dilation)]
    shape = (1, module.in_channels, *reach)
    return torch.rand(shape, device=weight.device, dtype=weight.dtype)


class _Watch(TorchDispatchMode):
    """Sees the products of a forward, and whether the zeros of the weight are in them.

    Attributes:
        kept: True or False, None as long as no product with the weight was seen.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight, self.kept = weight, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Look at the arguments of products, and pass everything on."""
        if func.overloadpacket.__name__ in PRODUCTS:
            for value in args:
                if isinstance(value, Tensor):
                    self._look(value)
        return func(*args, **(kwargs or {}))

    def _look(self, value: Tensor) -> None:
        weight = self.weight
        if value.data_ptr() == weight.data_ptr() and value.numel() == weight.numel():
            self.kept = True
            return
        if value.ndim < 2 or self.kept is True:
            return
        seen, zero = value.squeeze(), (weight == 0).squeeze()
        # Square weights do not tell whether they are transposed: either will do.
        sides = (seen, seen.T) if seen.ndim == 2 else (seen,)
        fits = [not bool(side[zero].any()) for side in sides if side.shape == zero.shape]
        if fits:
            self.kept = any(fits)
