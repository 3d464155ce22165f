"""The CUDA half without a GPU: it compiles, links, and works on stand-ins for the libraries.

The headers of cuSPARSE and cuSPARSELt come with wheels that `make setup` installs where nvcc is.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import sparsekern

ROOT = Path(sparsekern.__file__).parent.parent
STUBS = ROOT / "tests/stubbed/stubs"
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="sparsekern runs from an installed package"
)


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def setup_py(monkeypatch):
    """setup.py as a module, without the call of `setup` at its end."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("sparsekern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A folder with the CUDA half, linked beside this torch, and the stand-ins."""
    with pytest.MonkeyPatch.context() as patch:
        build = setup_py(patch)
        folders = build.cuda_include_dirs()
        missing = [
            h for h in build.CUDA_HEADERS if not any((Path(f) / h).exists() for f in folders)
        ]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: nothing of CUDA can be compiled here")
    out = tmp_path_factory.mktemp("cuda")
    includes = [*include_paths(), *folders, sysconfig.get_paths()["include"]]
    flags = [*build.FLAGS, "-O0", "-fPIC", "-shared", "-Werror", build.TORCH_TARGET]
    flags += [f for folder in includes for f in ("-isystem", folder)]
    flags.append("-DPy_LIMITED_API=0x030a0000")
    libraries = [f for folder in library_paths() for f in ("-L", folder, f"-Wl,-rpath,{folder}")]
    libraries += ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    target = str(out / "_C_cuda.abi3.so")
    # Our kernels as plain C++, see stubs/emulated.h.
    emulated = ["-DSPARSEKERN_EMULATED", f"-I{STUBS}", "-O1", build.KERNEL_OPS]
    emulated += [f for kernel in build.KERNELS for f in ("-x", "c++", kernel)]
    run("g++", *flags, *build.CUDA_SOURCES, *emulated, *libraries, "-o", target, cwd=ROOT)
    for name, library in (("cusparse", "libcusparse"), ("cusparselt", "libcusparseLt")):
        soname = f"{library}_stand_in.so"
        linking = ["-fvisibility=default", f"-Wl,-soname,{soname}", "-o", str(out / soname)]
        run("g++", *flags, str(STUBS / f"{name}.cpp"), *linking)
    return out


def test_only_the_stable_abi_and_the_stream_are_left_open(half):
    symbols = run("nm", "-D", "--undefined-only", "-C", str(half / "_C_cuda.abi3.so"))
    assert not re.findall(r"^ +U ((?:at|c10|torch)::.*)$", symbols, re.MULTILINE)
    names = set(re.findall(r"^ +[Uw] (\w+)", symbols, re.MULTILINE))
    # Of the libraries and the CUDA runtime nothing: they are opened when they are needed.
    assert not [n for n in names if n.startswith(("cusparse", "cuda", "cu"))]
    if torch.version.cuda is None:
        torch_cpu = next(p for f in library_paths() for p in Path(f).glob("libtorch_cpu.so"))
        known = run("nm", "-D", "--defined-only", str(torch_cpu))
        unknown = {n for n in names if n.startswith(("aoti_", "torch_")) and f" {n}\n" not in known}
        assert unknown == {"aoti_torch_get_current_cuda_stream"}  # only a CUDA torch has it


def test_the_cuda_half_works_on_stand_ins(half):
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = {**os.environ, "SPARSEKERN_STUBS": str(half), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(ROOT), "tests/stubbed"]
    assert "[100%]" in run(*command, cwd=ROOT, env=environment)


def test_setup_names_every_missing_header(monkeypatch, tmp_path):
    build = setup_py(monkeypatch)
    monkeypatch.setenv("SPARSEKERN_CUDA", "1")
    (tmp_path / "cusparse.h").touch()
    with pytest.raises(SystemExit, match=r"no cusparseLt\.h in the toolkit or the nvidia wheels"):
        build.cuda_choice([str(tmp_path)])
    monkeypatch.setenv("SPARSEKERN_CUDA", "")
    monkeypatch.setattr(torch.version, "cuda", None)
    chosen, reason = build.cuda_choice([str(tmp_path)])
    assert not chosen and reason.startswith("this torch is a CPU build; no cuda_runtime_api.h")
    for header in build.CUDA_HEADERS:
        (tmp_path / header).parent.mkdir(exist_ok=True)
        (tmp_path / header).touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    chosen, reason = build.cuda_choice([str(tmp_path)])
    assert chosen and reason == f"headers in {tmp_path}, torch for CUDA 13.0"


def nvcc(folder, release="13.0", fails=False):
    """A folder for PATH with a compiler that says its release, and perhaps fails."""
    folder.mkdir()
    tool = folder / "nvcc"
    tool.write_text(f"#!/bin/sh\necho 'release {release}, V1'\nexit {int(fails)}\n")
    tool.chmod(0o755)
    return str(folder)


def test_setup_says_why_there_are_no_kernels(monkeypatch, tmp_path):
    build = setup_py(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.nvcc_choice("/nowhere") == ([], "no nvcc", build.NO_NVCC)
    monkeypatch.setenv("PATH", nvcc(tmp_path / "old", "12.3") + ":/bin:/usr/bin")
    said = "nvcc 12.3, which is older than 12.5"
    assert build.nvcc_choice("/nowhere") == ([], said, build.OLD_NVCC)
    monkeypatch.setenv("PATH", nvcc(tmp_path / "bin") + ":/bin:/usr/bin")
    said = f"no libcudart_static.a beside {tmp_path}/bin/nvcc"
    assert build.nvcc_choice("/nowhere") == ([], said, build.NO_RUNTIME)
    runtime = tmp_path / "lib" / "libcudart_static.a"
    runtime.parent.mkdir()
    runtime.touch()
    tool = f"{tmp_path}/bin/nvcc"
    assert build.nvcc_choice("/nowhere") == ([tool, str(runtime)], f"{tool} 13.0", 0)


@pytest.mark.parametrize("fails", [True, False])
def test_the_cuda_half_is_built_without_kernels_that_nvcc_refuses(
    fails, monkeypatch, tmp_path, capsys
):
    build = setup_py(monkeypatch)
    monkeypatch.setenv("PATH", nvcc(tmp_path / "bin", fails=fails) + ":/bin:/usr/bin")
    tools = [f"{tmp_path}/bin/nvcc", "/lib/libcudart_static.a"]
    monkeypatch.setattr(build, "nvcc_choice", lambda: (tools, "", 0))
    half = build.cuda_extension([], {})
    before = list(half.sources)
    with ThreadPoolExecutor(1) as pool:
        build.add_kernels(half, tmp_path / "objects", pool)
    said = f"CUDA half without kernels of our own: nvcc failed at {tmp_path}/objects/decode_csr.o"
    assert (said in capsys.readouterr().out) == fails
    assert ("-DSPARSEKERN_NO_KERNELS=4" in half.extra_compile_args["cxx"]) == fails
    assert half.sources == (before if fails else [*before, build.KERNEL_OPS])
    assert bool(half.extra_objects) != fails and (tools[1] in half.extra_link_args) != fails


def test_the_module_has_the_words_of_setup(monkeypatch):
    build = setup_py(monkeypatch)
    text = (ROOT / "csrc/cuda/module.cpp").read_text()
    words = re.findall(r'"([^"]*)"', re.search(r"kNoKernels\[\] = \{(.*?)\}", text, re.DOTALL)[1])
    faults = (0, build.NO_NVCC, build.OLD_NVCC, build.NO_RUNTIME, build.NVCC_FAILED)
    assert [words[n] for n in faults] == [
        "",
        "no nvcc when it was built",
        "nvcc older than 12.5",
        "no libcudart_static.a beside nvcc",
        "nvcc failed",
    ]
