"""Our CUDA kernels as nvcc compiles them: registers, spills, and what an inner loop costs.

What they compute is tested in `tests/stubbed/test_own.py`, on an emulated GPU.
"""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from test_cuda_build import setup_py

import sparsekern

ROOT = Path(sparsekern.__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "setup.py").exists(), reason="sparsekern runs from an installed package"
    ),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]
KERNEL = re.compile(r"(nm_decode|csr_decode|finish)_kernel\w*?(Bfloat16|Float16)E?(?:Li(\d+))?E")


def of(mangled):
    """Kernel, number type, and tiles or tokens."""
    name, number, size = KERNEL.search(mangled).groups()
    return name, number, int(size or 0)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """By source: the object that the build makes, and what ptxas says of it."""
    with pytest.MonkeyPatch.context() as patch:
        build = setup_py(patch)
    if not build.nvcc_choice()[0]:
        pytest.skip(f"the build finds {build.nvcc_choice()[1]}")
    folder, found = tmp_path_factory.mktemp("objects"), {}
    for source in build.KERNELS:
        out = folder / f"{Path(source).stem}.o"
        command = ["nvcc", *build.KERNEL_FLAGS, "-Xptxas", "-v", "-c", source, "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
        found[Path(source).stem] = out, done.stderr
    return found


def usage(said, arch):
    """Registers, and bytes that were spilled, by kernel."""
    blocks = re.split(r"Compiling entry function '", said)[1:]
    return {
        of(block.split("'")[0]): (
            int(re.search(r"Used (\d+) registers", block)[1]),
            sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill \w+)", block))),
        )
        for block in blocks
        if f"for 'sm_{arch}'" in block
    }


@pytest.mark.parametrize("arch", [80, 90])
def test_everything_stays_in_registers(objects, arch):
    found = usage(objects["decode_nm"][1], arch) | usage(objects["decode_csr"][1], arch)
    assert len(found) == 2 * (4 + 4 + 1)
    # With 256 threads a block: two blocks on a multiprocessor, or four.
    limits = {"nm_decode": 128, "csr_decode": 64, "finish": 64}
    for kernel, (registers, spilled) in found.items():
        assert spilled == 0, kernel
        assert registers <= limits[kernel[0]], (kernel, registers)


def test_they_link_with_a_runtime_that_nobody_else_sees(objects, tmp_path, monkeypatch):
    (_, runtime), _, _ = setup_py(monkeypatch).nvcc_choice()
    out = tmp_path / "kernels.so"
    linking = ["-lrt", "-lpthread", "-ldl", "-Wl,--no-undefined", "-o", str(out)]
    linking.append(f"-Wl,--exclude-libs,{Path(runtime).name}")
    files = [str(path) for path, _ in objects.values()]
    subprocess.run(["g++", "-shared", *files, runtime, *linking], check=True)
    names = subprocess.run(["nm", "-D", str(out)], capture_output=True, text=True, check=True)
    assert not re.findall(r" (?:cuda|__cuda)\w+$", names.stdout, re.MULTILINE)


def sections(path):
    """The machine code for Hopper by kernel, as pairs of an address and an instruction."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "-sass", "-arch", "sm_90", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S.*?)\s*;")
    return {of(s.splitlines()[0]): line.findall(s) for s in text.split("Function : ")[1:]}


def instructions(path):
    return {kernel: [c for _, c in lines] for kernel, lines in sections(path).items()}


def loops(path):
    """Instructions of each loop, counted by name, by kernel."""
    found = {}
    for kernel, lines in sections(path).items():
        place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        code = [instruction for _, instruction in lines]
        jumps = [(i, re.match(r"BRA.* 0x([0-9a-f]+)$", c)) for i, c in enumerate(code)]
        ends = [(place[int(to[1], 16)], i) for i, to in jumps if to]
        found[kernel] = [Counter(c.split()[0] for c in code[s : e + 1]) for s, e in ends if s < e]
    return found


def smallest(counts, name):
    """The smallest loop that has an instruction whose name begins so."""
    return min((c for c in counts if any(n.startswith(name) for n in c)), key=Counter.total)


def total(count, name):
    return sum(n for key, n in count.items() if key.startswith(name))


def test_two_four_goes_from_memory_to_the_tensor_cores(objects):
    """A unit is nine loads of 16 bytes and eight products for each eight tokens."""
    for (_, number, tiles), counts in loops(objects["decode_nm"][0]).items():
        loop = smallest(counts, "HMMA.SP")
        units = 2 if tiles <= 2 else 1
        assert total(loop, "HMMA.SP.16832.F32") == 8 * tiles * units
        assert total(loop, "LDSM.16.M88.4") == 4 * tiles * units
        assert total(loop, "LDG.E") == total(loop, "LDG.E.NA.LTC256B.128.CONSTANT") == 9 * units
        assert total(loop, "LDGSTS.E.BYPASS.LTC128B.128") >= units  # x, past the registers
        # Lane instructions a weight; memory allows 7.2 on an H200 (bench/NOTES.md).
        assert loop.total() * 32 / (units * 32 * 128) < 2.2, (number, tiles, loop.total())


def test_clusters_meet_twice(objects):
    """Before the sums of others are read and before the block goes; in code for Hopper."""
    for kernel, code in instructions(objects["decode_nm"][0]).items():
        names = Counter(c.split()[0] for c in code)
        assert names["UCGABAR_ARV"] == names["UCGABAR_WAIT"] == 2, kernel
        assert names["MEMBAR.ALL.GPU"] == 2, kernel  # the meeting orders what came before it


def test_gathers_fit_the_budget(objects):
    """Instructions of a weight; memory allows 25 at 4 bytes each on an H200."""
    allowed = {1: 10, 2: 12, 4: 17.5, 8: 26}
    for (name, number, tokens), counts in loops(objects["decode_csr"][0]).items():
        if name == "csr_decode":
            loop = smallest(counts, "FFMA")
            words = total(loop, "LDG.E.NA.LTC256B.128.CONSTANT") * 4
            assert words == 8 and total(loop, "FFMA") == words * tokens
            assert total(loop, "LDS") == words
            assert loop.total() / words <= allowed[tokens], (number, tokens, loop.total() / words)
