"""Builds `_C` (CPU) always and `_C_cuda` where CUDA headers and a CUDA torch are found.

Our own CUDA kernels (csrc/cuda/*.cu) become a part of `_C_cuda` where nvcc is found as well;
without them it works through the libraries alone.

Force the CUDA choice with SPARSEKERN_CUDA=0 or SPARSEKERN_CUDA=1 (which also builds beside a CPU
torch; the result then only links). Headers are looked for in SPARSEKERN_CUDA_INCLUDE (folders,
separated by colons), the toolkit, and the wheels that CUDA builds of torch bring. Needs torch in
the environment: `pip install --no-build-isolation -e .`
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]

# One unit per instruction set, each with the flags of that set alone; csrc/cpu/isa.cpp checks every
# feature named here before it picks a table.
ISA_FLAGS = {"scalar": ["-ffp-contract=fast"]}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"]
    ISA_FLAGS["avxvnni"] = [*ISA_FLAGS["avx2"], "-mavxvnni"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        # gcc 12 takes the undefined operand of its own intrinsics for a mistake of ours
        *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    ]
    ISA_FLAGS["avx512vnni"] = [*ISA_FLAGS["avx512"], "-mavx512vnni"]
    ISA_FLAGS["avx512bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16", "-mavx512vbmi2", "-mpopcnt"]


def cuda_home() -> str:
    """The CUDA toolkit, empty where there is none; torch looks for it in CUDA builds alone."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    whole = [p for p in places if p and Path(p, "include/cuda_runtime_api.h").exists()]
    return whole[0] if whole else ""


CUDA_HOME = cuda_home()
# The libraries are opened at run time and the sources are plain C++: headers are all it needs.
CUDA_HEADERS = ("cuda_runtime_api.h", "crt/host_defines.h", "cusparse.h", "cusparseLt.h")
KERNEL_OPS = "csrc/cuda/decode_ops.cpp"
CUDA_SOURCES = sorted(str(p) for p in Path("csrc/cuda").glob("*.cpp") if str(p) != KERNEL_OPS)
KERNELS = sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
# Machine code for Ampere and Hopper, and PTX that the driver compiles for what comes later.
KERNEL_FLAGS = [
    *("-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90,code=[sm_90,compute_90]"),
]
SYSTEM = ["-lrt", "-lpthread", "-ldl"]  # of the static CUDA runtime
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)  # as torch's build reads it
NVCC_VERSION = (12, 5)  # the first that knows mma.sp::ordered_metadata
# Why there are none; the numbers go to csrc/cuda/module.cpp, which has the same words.
NO_NVCC, OLD_NVCC, NO_RUNTIME, NVCC_FAILED = 1, 2, 3, 4


class Build(BuildExtension):
    """Compiles the kernel units with their own flags before the extension is linked."""

    def build_extensions(self):
        """Build the kernel units, beside them our CUDA kernels, then the extensions."""
        with ThreadPoolExecutor(JOBS) as pool:
            units = pool.map(self.compile_unit, ISA_FLAGS)
            for extension in self.extensions[1:]:
                add_kernels(extension, Path(self.build_temp, "csrc/cuda"), pool)
            self.extensions[0].extra_objects = [o for objects in units for o in objects]
        super().build_extensions()

    def compile_unit(self, isa: str) -> list[str]:
        """The kernels for one instruction set."""
        return self.compiler.compile(
            [f"csrc/cpu/kernels_{isa}.cpp"],
            output_dir=self.build_temp,
            extra_postargs=["-fPIC", *FLAGS, *ISA_FLAGS[isa]],
            depends=[str(p) for p in Path("csrc/cpu").glob("*") if p.suffix in (".h", ".inl")],
        )


def nvcc_choice(home: str = CUDA_HOME) -> tuple[list[str], str, int]:
    """The nvcc and the static CUDA runtime, or none; what was found, and the number of a fault."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if not nvcc:
        return [], "no nvcc", NO_NVCC
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    version = tuple(map(int, release.groups())) if release else (0, 0)
    if version < NVCC_VERSION:
        return [], f"nvcc {'.'.join(map(str, version))}, which is older than 12.5", OLD_NVCC
    for place in dict.fromkeys((str(Path(nvcc).resolve().parent.parent), home or "/usr")):
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            runtime = Path(place, folder, "libcudart_static.a")
            if runtime.exists():
                return [nvcc, str(runtime)], f"{nvcc} {'.'.join(map(str, version))}", 0
    return [], f"no libcudart_static.a beside {nvcc}", NO_RUNTIME


def add_kernels(extension, folder: Path, pool: ThreadPoolExecutor) -> None:
    """Compile our kernels with nvcc and add them to the CUDA half, or the number of the reason."""
    tools, _, fault = nvcc_choice()
    objects = [str(folder / f"{Path(source).stem}.o") for source in KERNELS]
    if tools:
        nvcc, runtime = tools
        folder.mkdir(parents=True, exist_ok=True)
        commands = [[nvcc, *KERNEL_FLAGS, "-c", s, "-o", o] for s, o in zip(KERNELS, objects)]
        # Linked alone first: whatever is wrong with them must not take the libraries along.
        trial = ["-shared", "-cudart", "none", "-Xlinker", "--no-undefined", *objects, runtime]
        trial = [nvcc, *trial, *SYSTEM, "-o", str(folder / "trial.so")]
        fault = 0 if all(pool.map(succeeds, commands)) and succeeds(trial) else NVCC_FAILED
    if fault:
        extension.extra_compile_args["cxx"].append(f"-DSPARSEKERN_NO_KERNELS={fault}")
        return
    extension.sources.append(KERNEL_OPS)
    extension.extra_objects = objects
    # Ours alone: a process may have a shared runtime as well, torch's.
    hidden = f"-Wl,--exclude-libs,{Path(runtime).name}"
    extension.extra_link_args += [runtime, *SYSTEM, hidden]


def succeeds(command: list[str]) -> bool:
    """Run a step of the kernels' build; say what failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        print(f"sparsekern: CUDA half without kernels of our own: nvcc failed at {command[-1]}")
    return done.returncode == 0


def cuda_include_dirs() -> list[str]:
    """Folders that hold the CUDA headers, those of the toolkit first."""
    folders = [Path(p) for p in os.environ.get("SPARSEKERN_CUDA_INCLUDE", "").split(":") if p]
    if CUDA_HOME:
        folders.append(Path(CUDA_HOME, "include"))
    nvidia = importlib.util.find_spec("nvidia")
    for place in nvidia.submodule_search_locations if nvidia else ():
        folders += sorted(Path(place).glob("*/include"))
    return [str(f) for f in folders if any((f / header).exists() for header in CUDA_HEADERS)]


def cuda_choice(include_dirs: list[str]) -> tuple[bool, str]:
    """Whether to build the CUDA half, and why."""
    forced = os.environ.get("SPARSEKERN_CUDA", "")
    if forced not in ("", "0", "1"):
        raise SystemExit(f"setup: expected SPARSEKERN_CUDA to be 0 or 1, got '{forced}'")
    if forced == "0":
        return False, "SPARSEKERN_CUDA=0"
    missing = [
        f"no {header} in the toolkit or the nvidia wheels"
        for header in CUDA_HEADERS
        if not any(Path(folder, header).exists() for folder in include_dirs)
    ]
    if forced == "1" and missing:
        raise SystemExit("setup: SPARSEKERN_CUDA=1, but " + " and ".join(missing))
    if forced == "1":
        return True, "SPARSEKERN_CUDA=1"
    if not torch.version.cuda:
        missing.insert(0, "this torch is a CPU build")
    found = f"headers in {', '.join(include_dirs)}, torch for CUDA {torch.version.cuda}"
    return not missing, "; ".join(missing) or found


def cuda_extension(include_dirs: list[str], common: dict) -> CppExtension:
    """The CUDA half. The wheels' headers come after the toolkit's, which they must not hide."""
    flags = [f for folder in include_dirs for f in ("-isystem", folder)]
    options = {**common, "extra_compile_args": {"cxx": [*FLAGS, TORCH_TARGET, *flags]}}
    libraries = ["dl"]
    if torch.version.cuda:
        libraries.append("torch_cuda")  # has the current stream
    return CppExtension("sparsekern._C_cuda", CUDA_SOURCES, libraries=libraries, **options)


def extensions() -> list:
    """The extension modules to build; prints what was chosen in one line."""
    common = {
        "extra_compile_args": {"cxx": [*FLAGS, TORCH_TARGET]},
        "py_limited_api": True,
    }
    cpu = (
        *("ops", "int8", "dynamic", "conv", "block", "block_ops", "nm", "nm_ops", "norm"),
        *("driver", "seal", "conv_lines", "depthwise", "few_tokens", "isa"),
    )
    cpu = [f"csrc/cpu/{name}.cpp" for name in cpu]
    found = [CppExtension("sparsekern._C", [*cpu, "csrc/host/module.cpp"], **common)]
    include_dirs = cuda_include_dirs()
    build_cuda, reason = cuda_choice(include_dirs)
    if build_cuda:
        found.append(cuda_extension(include_dirs, common))
    own = f"; own CUDA kernels: {nvcc_choice()[1]}" if build_cuda else ""
    print(
        f"sparsekern: CPU kernels for {', '.join(ISA_FLAGS)}; "
        f"CUDA half {'built' if build_cuda else 'not built'}: {reason}{own}"
    )
    return found


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
