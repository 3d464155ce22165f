"""What a device can run, as the conversion needs to know: dtypes, kernels, caches to get past."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ops.cuda_support import device_facts, device_fault

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


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
    if device.type == "cuda" and (fault := device_fault(facts_of(device), (7, 0))):
        return f"no sparse kernel on {device}: {fault}"
    if weight.dtype not in DTYPES[device.type]:
        return f"no kernel for {weight.dtype}"
    return ""


def format_fault(name: str, kind: str, device: torch.device) -> str:
    """Why a format has no kernel on a device, or an empty string.

    A way that a GPU has for some shapes only counts as one: what it does to the others, the timing
    finds out.

    Args:
        name: `csr`, `block` or `nm`.
        kind: Kind of the layer: `Linear`, `Conv1D`, `Conv2d`.
        device: Where its weight is.
    """
    op = f"{name}_{'conv2d' if kind == 'Conv2d' else 'linear'}"
    if device.type == "cpu":  # without compiled kernels no layer gets this far
        return ""
    if not has_kernel(op, device.type):
        return f"{op} has no kernel on {device.type}"
    faults = {"csr": _csr_faults, "nm": _nm_faults, "block": _block_faults}[name](device)
    return f"{op}: {'; '.join(faults)}" if all(faults) else ""


def facts_of(device: torch.device):
    """What decides which kernels a CUDA device can run."""
    return device_facts(torch.cuda.current_device() if device.index is None else device.index)


def _csr_faults(device) -> list[str]:
    from .ops import csr_cuda

    facts = facts_of(device)
    return [csr_cuda.cusparse_fault(facts), csr_cuda.kernel_fault(facts)]


def _nm_faults(device) -> list[str]:
    from .ops import cslt, nm_cuda

    facts = facts_of(device)
    return [cslt.library_fault(facts), nm_cuda.kernel_fault(facts)]


def _block_faults(device) -> list[str]:
    from .ops import block_cuda

    return [block_cuda.kernel_fault(device)]


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
