"""Builds `_C` (CPU) always and `_C_cuda` where a CUDA toolkit and a CUDA torch are found.

Force the CUDA choice with SPARSEKERN_CUDA=0 or SPARSEKERN_CUDA=1. Needs torch in the environment:
`pip install --no-build-isolation -e .`
"""

import os
import platform
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]

# One unit per instruction set, each with the flags of that set alone; csrc/cpu/isa.cpp checks every
# feature named here before it picks a table.
ISA_FLAGS = {"scalar": ["-ffp-contract=fast"]}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        # gcc 12 takes the undefined operand of its own intrinsics for a mistake of ours
        *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    ]
    ISA_FLAGS["avx512bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16", "-mavx512vbmi2", "-mpopcnt"]


class Build(BuildExtension):
    """Compiles the kernel units with their own flags before the extension is linked."""

    def build_extensions(self):
        """Build the kernel units, then the extensions that link them."""
        objects = []
        for isa, flags in ISA_FLAGS.items():
            objects += self.compiler.compile(
                [f"csrc/cpu/kernels_{isa}.cpp"],
                output_dir=self.build_temp,
                extra_postargs=["-fPIC", *FLAGS, *flags],
                depends=[str(p) for p in Path("csrc/cpu").glob("*") if p.suffix in (".h", ".inl")],
            )
        self.extensions[0].extra_objects = objects
        super().build_extensions()


def cuda_choice(sources: list[str]) -> tuple[bool, str]:
    """Whether to build the CUDA half, and why."""
    forced = os.environ.get("SPARSEKERN_CUDA", "")
    if forced not in ("", "0", "1"):
        raise SystemExit(f"setup: expected SPARSEKERN_CUDA to be 0 or 1, got '{forced}'")
    if forced == "0":
        return False, "SPARSEKERN_CUDA=0"
    missing = [
        reason
        for present, reason in (
            (sources, "no CUDA sources in this version"),
            (CUDA_HOME, "no CUDA toolkit found (CUDA_HOME)"),
            (torch.version.cuda, "this torch is a CPU build"),
        )
        if not present
    ]
    if forced == "1" and (not sources or not CUDA_HOME):
        raise SystemExit("setup: SPARSEKERN_CUDA=1, but " + " and ".join(missing[:2]))
    if forced == "1":
        return True, "SPARSEKERN_CUDA=1"
    found = f"toolkit at {CUDA_HOME}, torch for CUDA {torch.version.cuda}"
    return not missing, "; ".join(missing) or found


def extensions() -> list:
    """The extension modules to build; prints what was chosen in one line."""
    common = {
        "extra_compile_args": {"cxx": [*FLAGS, TORCH_TARGET]},
        "py_limited_api": True,
    }
    cpu = (
        *("ops", "int8", "conv", "block", "block_ops", "nm", "nm_ops"),
        *("driver", "conv_lines", "few_tokens", "isa"),
    )
    cpu = [f"csrc/cpu/{name}.cpp" for name in cpu]
    found = [CppExtension("sparsekern._C", [*cpu, "csrc/host/module.cpp"], **common)]
    cuda = sorted(str(p) for p in Path("csrc/cuda").glob("*.c*"))
    build_cuda, reason = cuda_choice(cuda)
    if build_cuda:
        found.append(CUDAExtension("sparsekern._C_cuda", cuda, **common))
    print(
        f"sparsekern: CPU kernels for {', '.join(ISA_FLAGS)}; "
        f"CUDA half {'built' if build_cuda else 'not built'}: {reason}"
    )
    return found


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
