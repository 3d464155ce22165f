"""What machine a measurement was taken on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

# The features sparse and dense kernels choose by; the full list of flags would drown them.
ISA_FLAGS = (
    "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8",
    "neon", "asimd", "sve", "bf16",
)  # fmt: skip

CPUINFO = Path("/proc/cpuinfo")


def hardware(cpuinfo: Path = CPUINFO) -> dict[str, object]:
    """Describe the machine: the header of every measurement.

    Starts CUDA only if CUDA is already in use; otherwise `gpus` lists nothing and `cuda_in_use`
    is False.

    Args:
        cpuinfo: file in the format of Linux's /proc/cpuinfo; an unreadable one gives the name
            Python's `platform` knows and no flags.

    Returns:
        Plain values fit for JSON: cpu, cores, isa (list), threads, os, python, torch, mkl, onednn,
        cuda (version torch was built for, or None), cuda_in_use, gpus (list of names).
    """
    model, flags = _read_cpuinfo(cpuinfo)
    build = torch.__config__.show()
    in_use = torch.cuda.is_initialized()
    gpus = range(torch.cuda.device_count()) if in_use else ()
    return {
        "cpu": model,
        "cores": available_cores(),
        "isa": [f for f in ISA_FLAGS if f in flags],
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": _library_version(build, r"Math Kernel Library Version (\d[\d.]*)"),
        "onednn": _library_version(build, r"(?:MKL-DNN|oneDNN) v(\S+)"),
        "cuda": torch.version.cuda,
        "cuda_in_use": in_use,
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
    }


def commit(folder: str | Path) -> str | None:
    """Commit of a checkout, with `+changes` if a tracked file differs; None outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def available_cores() -> int:
    """Cores this process may run on (a container or taskset may allow fewer than exist)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_cpuinfo(path: Path) -> tuple[str, set[str]]:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), set()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    name = model.group(1).strip() if model else platform.processor() or platform.machine()
    return name, set(flags.group(1).split()) if flags else set()


def _library_version(build: str, pattern: str) -> str | None:
    found = re.search(pattern, build)
    return found.group(1) if found else None
