"""The card a figure was measured on, and the state it was in."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import torch

from sparsekern._load import native_status
from sparsekern.measure import hardware
from sparsekern.measure.energy import load_nvml
from sparsekern.measure.nvml import MEMORY_CLOCK, SM_CLOCK
from sparsekern.ops.own_cuda import build_fault

LOST = 86  # exit code of a process whose GPU context is gone
ROOT = Path(__file__).parents[2]
SOURCES = ("csrc", "sparsekern", "bench/gpu", "tests")
PACKAGES = (
    "triton", "numpy", "nvidia-cusparse", "nvidia-cusparselt-cu13", "nvidia-cublas",
    "nvidia-cudnn-cu13",
)  # fmt: skip


class Card:
    """One GPU by NVML: clocks and power. Every reading is None where NVML is not to be had."""

    def __init__(self, device: torch.device, nvml=None):
        self.reason, self._nvml = "", None
        if device.type != "cuda":
            self.reason = "no GPU"
            return
        try:
            found = nvml or load_nvml()
            found.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = found.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = found
        except Exception as error:  # two bindings, each with exceptions of its own
            self.reason = str(error) or repr(error)

    def _read(self, name: str, *arguments):
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, name)(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def state(self) -> dict[str, float | None]:
        """Clocks in MHz and watts now."""
        milliwatts = self._read("nvmlDeviceGetPowerUsage")
        return {
            "sm_mhz": self._read("nvmlDeviceGetClockInfo", SM_CLOCK),
            "memory_mhz": self._read("nvmlDeviceGetClockInfo", MEMORY_CLOCK),
            "watts": None if milliwatts is None else milliwatts / 1e3,
        }

    def limits(self) -> dict[str, object]:
        """Driver, highest clocks in MHz and the power limit in watts."""
        milliwatts = self._read("nvmlDeviceGetEnforcedPowerLimit")
        driver = self._nvml and self._nvml.nvmlSystemGetDriverVersion()
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "sm_mhz_max": self._read("nvmlDeviceGetMaxClockInfo", SM_CLOCK),
            "memory_mhz_max": self._read("nvmlDeviceGetMaxClockInfo", MEMORY_CLOCK),
            "watts_max": None if milliwatts is None else milliwatts / 1e3,
            "nvml": self.reason or "read",
        }


def header(device: torch.device) -> dict[str, object]:
    """Card, limits, libraries and what is built."""
    found = {"hardware": hardware(), "libraries": libraries(), "state": Card(device).state()}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gb": round(p.total_memory / 1e9, 1),
            "l2_mb": round(p.L2_cache_size / 1e6, 1),
            **Card(device).limits(),
        }
    status = native_status()
    found["halves"] = {name: half["reason"] or "loaded" for name, half in status.items()}
    found["kernels for few tokens"] = build_fault() or "compiled by nvcc"
    return found


def libraries() -> dict[str, str | None]:
    """Versions of what the kernels come from; None where a package is not there by that name."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    found["cudnn"] = torch.backends.cudnn.version()
    backend = getattr(torch.backends, "cusparselt", None)
    there = backend is not None and backend.is_available()
    found["cusparselt of torch"] = str(backend.version()) if there else None
    return found


def fingerprint() -> str:
    """Twelve digits that change with any source: figures of two versions never mix."""
    total = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).glob("**/*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".inl", ".cuh"):
                total.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def context_error() -> str:
    """What CUDA says to a synchronisation, an empty string while all is well."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""
