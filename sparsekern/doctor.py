"""`sparsekern doctor`: what is here, what is missing, why, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

from sparsekern import _load
from sparsekern.measure.energy import POWERCAP, find_meter
from sparsekern.measure.hardware import hardware
from sparsekern.ops import own_cuda
from sparsekern.ops.cuda_libraries import CUSPARSE, CUSPARSELT, find_library

OPTIONAL_PACKAGES = {
    "matplotlib": ("plots in HTML reports", "pip install matplotlib jinja2"),
    "jinja2": ("HTML reports", "pip install matplotlib jinja2"),
    "transformers": ("bench models from transformers", "pip install transformers"),
}


class Diagnosis(dict):
    """What `doctor` found: a dict fit for JSON that prints as text.

    Keys: `versions`, `hardware`, `isa`, and `parts`, a dict from a part's name to a dict with
    `available` (bool), `detail` (what is there, or why it is missing) and `remedy` (empty when
    available).
    """

    @property
    def ok(self) -> bool:
        """Whether the compiled CPU kernels are in use; everything else is optional."""
        return self["parts"]["CPU kernels (_C)"]["available"]

    def __str__(self) -> str:
        """The findings as text, one line per fact."""
        machine = self["hardware"]
        lines = ["sparsekern doctor", ""]
        lines += [f"  {name:<12} {version}" for name, version in self["versions"].items()]
        lines += [
            "",
            f"  {'CPU':<12} {machine['cpu']}, {machine['cores']} core(s) for this process",
            f"  {'features':<12} {' '.join(machine['isa']) or 'none known'}",
            f"  {'kernels run':<12} {self['isa']}",
            "",
        ]
        for name, part in self["parts"].items():
            lines.append(f"  [{'ok' if part['available'] else '--'}] {name}: {part['detail']}")
            if not part["available"]:
                lines.append(f"       remedy: {part['remedy']}")
        return "\n".join(lines)


def doctor(quiet: bool = False) -> Diagnosis:
    """Look at the installation, print the findings and return them.

    Unlike an import of the package this may start CUDA, to name the GPU.

    Args:
        quiet: only return, print nothing.
    """
    if torch.cuda.is_available():
        torch.cuda.init()
    diagnosis = Diagnosis(
        versions=_versions(), hardware=hardware(), isa=_load.cpu_isa(), parts=_parts()
    )
    if not quiet:
        print(diagnosis)
    return diagnosis


def _versions() -> dict[str, str]:
    return {
        "sparsekern": _version("sparsekern") or "not installed as a package",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton") or "not installed",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _part(available: bool, detail: str, remedy: str = "") -> dict[str, object]:
    return {"available": available, "detail": detail, "remedy": "" if available else remedy}


def _parts() -> dict[str, dict[str, object]]:
    native = _load.native_status()
    parts = {
        "CPU kernels (_C)": _native(native["_C"]),
        "GPU kernels (_C_cuda)": _native(native["_C_cuda"]),
        "GPU kernels for few tokens": _own_kernels(),
        "GPU": _gpu(),
        "cuSPARSE": _library(CUSPARSE),
        "cuSPARSELt": _library(CUSPARSELT),
        "Triton": _triton(),
        "energy counter, CPU": _energy(torch.device("cpu")),
        "energy counter, GPU": _gpu_energy(),
    }
    for package, (purpose, remedy) in OPTIONAL_PACKAGES.items():
        parts[package] = _package(package, purpose, remedy)
    return parts


def _native(status) -> dict[str, object]:
    loaded = bool(status["loaded"])
    return _part(loaded, "loaded" if loaded else status["reason"], status.get("remedy", ""))


def _own_kernels() -> dict[str, object]:
    fault = own_cuda.build_fault()
    remedy = "put nvcc 12.5 or newer on the PATH and build the CUDA half again"
    return _part(not fault, fault or "compiled by nvcc", remedy)


def _gpu() -> dict[str, object]:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return _part(True, ", ".join(torch.cuda.get_device_name(i) for i in range(count)))
    if torch.version.cuda is None:
        return _part(False, "this torch was built without CUDA", "install a CUDA build of torch")
    return _part(
        False, "torch sees no GPU", "check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES"
    )


def _library(library) -> dict[str, object]:
    if torch.version.cuda is None:
        return _part(False, "this torch was built without CUDA", "install a CUDA build of torch")
    version, fault = find_library(library)
    if fault:
        return _part(False, fault, f"pip install -U the wheel of {library.name} for your CUDA")
    return _part(True, f"version {'.'.join(map(str, version))}")


def _triton() -> dict[str, object]:
    version = _version("triton")
    if version is None:
        return _part(False, "not installed", "pip install triton (Linux; CUDA torch brings it)")
    return _part(True, f"version {version}")


def _energy(device: torch.device) -> dict[str, object]:
    meter, reason = find_meter(device, POWERCAP)
    if meter is not None:
        return _part(True, f"{meter.source}, {reason}")
    return _part(False, reason, "run as root on the machine itself, or ask for energy='modelled'")


def _gpu_energy() -> dict[str, object]:
    if not torch.cuda.is_available():
        return _part(False, "no GPU", "see GPU above")
    meter, reason = find_meter(torch.device("cuda", torch.cuda.current_device()))
    remedy = "use a GPU that has the counter, with its driver's libnvidia-ml or nvidia-ml-py"
    return _part(meter is not None, f"{meter.source}, {reason}" if meter else reason, remedy)


def _package(name: str, purpose: str, remedy: str) -> dict[str, object]:
    if importlib.util.find_spec(name) is None:
        return _part(False, f"not installed, needed for {purpose}", remedy)
    return _part(True, f"version {_version(name)}, for {purpose}")
