"""What a device can run, as the conversion needs to know: dtypes, kernels, caches to get past."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._load import native_status

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
FORMATS = ("csr", "block", "nm")
MIN_CAPABILITY = (8, 0)  # asynchronous copies and bfloat16 products, which all our kernels use


def has_kernel(op: str, device_type: str) -> bool:
    """Whether an op has a kernel of its own on a device, beside the plain torch reference.

    Args:
        op: Name without namespace, `csr_linear`.
        device_type: `cpu`, `cuda`.
    """
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"sparsekern::{op}", key
    )


def device_obstacle(weight: Tensor) -> str:
    """Why no layer with this weight can be sparse where it is, or an empty string."""
    device = weight.device
    if device.type not in DTYPES:
        return f"no sparse kernel on {device.type} in this version"
    if device.type == "cuda":
        if torch.version.hip:
            return "no sparse kernel for ROCm in this version"
        if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
            have = ".".join(map(str, torch.cuda.get_device_capability(device)))
            return f"sparse kernels need compute capability 8.0, {device} has {have}"
        if not any(has_kernel(f"{name}_linear", "cuda") for name in FORMATS):
            return f"no sparse kernel on cuda here: {native_status()['_C_cuda']['reason']}"
    if weight.dtype not in DTYPES[device.type]:
        return f"no kernel for {weight.dtype}"
    return ""


def runnable(formats: list[str], kind: str, device_type: str) -> list[str]:
    """Those of the formats that have a kernel on a device.

    Args:
        formats: Names as `fitting_formats` gives them.
        kind: Kind of the layer: `Linear`, `Conv1D`, `Conv2d`.
        device_type: `cpu` takes all: without compiled kernels no layer gets this far.
    """
    if device_type == "cpu":
        return formats
    op = "conv2d" if kind == "Conv2d" else "linear"
    return [name for name in formats if has_kernel(f"{name}_{op}", device_type)]


def cold_bytes(model: nn.Module, device: torch.device) -> int:
    """Bytes of weights to rotate through when a layer is timed, so that caches tell no lies.

    In a model larger than the L2 of a GPU every layer finds its weights in the memory behind it; a
    layer timed alone, again and again, finds them in the L2. On a CPU 0: its layers are timed warm.
    """
    if device.type != "cuda":
        return 0
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return 2 * l2 if size > l2 else 0
