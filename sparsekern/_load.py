"""Loads the compiled halves and remembers why one is absent.

A missing half is no error at import: the ops then run their plain torch reference, and
`sparsekern doctor` tells the reason and the remedy.
"""

import functools
import importlib

import torch  # noqa: F401  (its libraries must be in the process before ours)

REMEDY = {
    "_C": "build it: pip install --no-build-isolation -e .   (needs a C++ compiler)",
    "_C_cuda": "build it beside a CUDA torch whose wheels or toolkit have the headers of cuSPARSE "
    "and cuSPARSELt: SPARSEKERN_CUDA=1 pip install --no-build-isolation -e .",
}


def _load(name: str):
    try:
        return importlib.import_module(f"sparsekern.{name}"), ""
    except ImportError as error:
        return None, str(error)


_C, _C_REASON = _load("_C")


@functools.cache
def cuda_half():
    """The CUDA half and an empty reason, or None and the reason; loaded when first asked for."""
    return _load("_C_cuda")


def native_status() -> dict[str, dict]:
    """State of each compiled half: `{name: {"loaded": bool, "reason": str, "remedy": str}}`."""
    cuda, cuda_reason = cuda_half()
    status = {}
    for name, half, reason in (("_C", _C, _C_REASON), ("_C_cuda", cuda, cuda_reason)):
        status[name] = {"loaded": half is not None, "reason": reason, "remedy": REMEDY[name]}
    return status


def cpu_isa() -> str:
    """Name of the CPU instruction set whose kernels run: `avx512`, `avx2`, `scalar`.

    `reference` when nothing is compiled.
    """
    return _C.cpu_isa() if _C else "reference"


def available_isas() -> list[str]:
    """Instruction sets whose kernels this CPU can run, the plainest first."""
    return _C.available_isas() if _C else ["reference"]
