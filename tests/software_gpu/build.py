"""Makes build/software_gpu: a CUDA torch whose GPU is the host, see README.md.

Run again, it makes what is missing or older than its sources.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HOME = ROOT / "build/software_gpu"
PYTHON = HOME / "venv/bin/python"
# The checkout by links, and in it the package with compiled halves of its own.
TREE = HOME / "tree"
STUBS = ROOT / "tests/stubbed/stubs"
# Triton 3.6, which this torch wants, cannot interpret beside numpy 2.4 and later.
PACKAGES = (
    *("torch==2.11.0", "nvidia-cuda-crt>=13,<13.1", "nvidia-cuda-cccl>=13,<13.1", "numpy<2.4"),
    *("nvidia-ml-py", "safetensors", "rich", "matplotlib", "jinja2", "scipy"),
    *("pytest", "hypothesis", "expecttest", "setuptools>=77", "wheel", "ninja"),
)
BACKEND = "software_gpu_aten"
LEFT_OVER = """#include <stdio.h>
#include <stdlib.h>
static long nothing(const char* name) {
  if (getenv("SOFTWARE_GPU_LOG")) fprintf(stderr, "software GPU: %s does nothing\\n", name);
  return 0;
}
"""


def run(*command: object, **options) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode:
        said = f"{done.stdout}\n{done.stderr}"[-4000:]
        raise SystemExit(f"software GPU: {' '.join(map(str, command))} failed\n{said}")
    return done.stdout


def build() -> None:
    """All of it."""
    if not (HOME / "installed").exists():
        install()
    link_tree()
    replace_libraries()
    run(PYTHON, __file__, "--inside", cwd=TREE)


def install() -> None:
    """An environment with a CUDA torch, made by Python 3.12 or by the one at hand."""
    print(f"software GPU: 2.5 GB of wheels into {HOME}/venv", flush=True)
    found = shutil.which("python3.12")
    works = found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0
    run(found if works else sys.executable, "-m", "venv", "--clear", HOME / "venv")
    run(PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES)
    (HOME / "installed").touch()


def link_tree() -> None:
    """What is new in the checkout appears in the tree; compiled halves stay where they are."""
    (TREE / "sparsekern").mkdir(parents=True, exist_ok=True)
    for folder in (ROOT, ROOT / "sparsekern"):
        for path in folder.iterdir():
            link = TREE / path.relative_to(ROOT)
            if path.suffix != ".so" and path.name not in ("build", ".git") and not link.exists():
                link.symlink_to(path)


def older(target: Path, *sources: Path) -> bool:
    """Whether it has to be made: sources are files or folders of them."""
    if not target.exists():
        return True
    files = [f for s in sources for f in (s.rglob("*") if s.is_dir() else [s])]
    return target.stat().st_mtime < max(f.stat().st_mtime for f in files)


def nvidia() -> Path:
    """Where that environment has NVIDIA's wheels."""
    return next(HOME.glob("venv/lib/python3.*/site-packages/nvidia"))


def cuda_headers() -> tuple[str, ...]:
    """Flags for their headers, not those of a toolkit that may be another version."""
    return tuple(f"-I{folder}" for folder in sorted(nvidia().glob("*/include")))


def replace_libraries() -> None:
    """NVIDIA's libraries in that environment; the originals stay beside ours, as `.real`."""
    toolkit, lt = nvidia() / "cu13/lib", nvidia() / "cusparselt/lib"
    headers = cuda_headers()
    declared = run("gcc", "-E", *headers, "-include", "cuda.h", "-x", "c", os.devnull)
    driver = set(re.findall(r"\b(cu[A-Z]\w+) ?\(", declared))
    stand_in(toolkit / "libcuda.so.1", HERE / "driver.c", headers, driver, "-ldl")
    if not (toolkit / "libcuda.so").exists():  # what Triton's launcher is linked to
        (toolkit / "libcuda.so").symlink_to("libcuda.so.1")
    versions = HOME / "versions.map"
    versions.write_text("libcudart.so.13 { global: *; };\n")
    beside = (toolkit / "libcuda.so.1", "-Wl,-rpath,$ORIGIN", f"-Wl,--version-script={versions}")
    stand_in(toolkit / "libcudart.so.13", HERE / "runtime.c", headers, set(), *beside)
    flags = ("-std=c++17", "-O3", "-march=native", "-DSTUB_CUDA_TORCH", *headers)
    stand_in(toolkit / "libcusparse.so.12", STUBS / "cusparse.cpp", flags, set(), "-lstdc++")
    stand_in(lt / "libcusparseLt.so.0", STUBS / "cusparselt.cpp", flags, set(), "-lstdc++")


def stand_in(target: Path, source: Path, flags: tuple, names: set[str], *linking: object) -> None:
    """Our library in the place of another, with all its names; what we lack does nothing."""
    made = HOME / f"{target.name}.made"  # the age of a target may be that of the wheel
    if not older(made, source, STUBS):
        return
    own, rest = HOME / f"{source.stem}.o", HOME / f"{source.stem}_rest.c"
    run("gcc", "-c", "-fPIC", "-w", *flags, source, "-o", own)
    if not names:  # there is an original
        real = target.with_name(f"{target.name}.real")
        if not real.exists():
            target.rename(real)
        names = {n.split("@")[0] for n in defined("-D", real)}
    left = sorted(n for n in names - set(defined(own)) if re.fullmatch(r"_*cu\w+", n))
    lines = (f'long {n}(void) {{ return nothing("{n}"); }}\n' for n in left)
    rest.write_text(LEFT_OVER + "".join(lines))
    linking = (*linking, f"-Wl,-soname,{target.name}", "-o", target)
    run("gcc", "-shared", "-fPIC", "-w", rest, own, *linking)
    made.touch()


def defined(*options: object) -> list[str]:
    """Symbols that a library or an object file defines."""
    return [line.split()[-1] for line in run("nm", "--defined-only", *options).splitlines() if line]


# From here on by the Python of that environment, in the tree.


def build_inside() -> None:
    """The backend of torch, then both halves of the package."""
    from torch.utils.cpp_extension import include_paths, library_paths

    paths = (*include_paths(), sysconfig.get_paths()["include"])
    includes = [f for folder in paths for f in ("-isystem", folder)]
    folders = [f for d in library_paths() for f in (f"-L{d}", f"-Wl,-rpath,{d}")]
    libraries = [*folders, "-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-ldl"]
    site = Path(sysconfig.get_paths()["purelib"])
    backend = site / f"{BACKEND}.so"
    if older(backend, HERE / "aten.cpp"):
        flags = ("-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-DTORCH_EXTENSION_NAME={BACKEND}")
        python = ("-ltorch_python", "-o", backend)
        run("g++", *flags, *includes, HERE / "aten.cpp", *libraries, *python)
        about = site / f"{BACKEND}-0.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {BACKEND}\nVersion: 0\n")
        (about / "entry_points.txt").write_text(f"[torch.backends]\n{BACKEND}={BACKEND}:install\n")
    cpu, half = (TREE / f"sparsekern/{name}.abi3.so" for name in ("_C", "_C_cuda"))
    if older(cpu, ROOT / "csrc/cpu", ROOT / "csrc/host", ROOT / "setup.py"):
        environment = {**os.environ, "SPARSEKERN_CUDA": "0"}
        run(sys.executable, "setup.py", "build_ext", "--inplace", env=environment)
        cpu.touch()  # not linked again where nothing else was
    if older(half, ROOT / "csrc/cuda", ROOT / "csrc/host", STUBS):
        cuda_half(half, includes, libraries)


def cuda_half(target: Path, includes: list[str], libraries: list[str]) -> None:
    """`_C_cuda` with our kernels as plain C++, as tests/test_cuda_build.py makes it."""
    import setuptools

    setuptools.setup = lambda **options: None
    spec = importlib.util.spec_from_file_location("sparsekern_setup", "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flags = [*module.FLAGS, "-march=native", "-w", "-fPIC", module.TORCH_TARGET, *includes]
    flags += [*cuda_headers(), "-DPy_LIMITED_API=0x030a0000"]
    # The kernels apart: the rest opens the libraries by the names that they have beside torch.
    emulated = ["-DSPARSEKERN_EMULATED", "-DSTUB_CUDA_TORCH", f"-I{STUBS}", module.KERNEL_OPS]
    emulated += [f for kernel in module.KERNELS for f in ("-x", "c++", kernel)]
    kernels = HOME / "kernels.o"
    run("g++", *flags, "-r", *emulated, "-o", kernels)
    run("g++", *flags, "-shared", *module.CUDA_SOURCES, kernels, *libraries, "-o", target)


if __name__ == "__main__":
    build_inside() if "--inside" in sys.argv else build()
