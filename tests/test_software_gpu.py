"""The runtime and the driver of tests/software_gpu: what they compute themselves."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_cuda_build import ROOT, setup_py

SOURCES = ROOT / "tests/software_gpu"
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="sparsekern runs from an installed package"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Both in one library."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    with pytest.MonkeyPatch.context() as patch:
        folders = setup_py(patch).cuda_include_dirs()
    for header in ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h"):
        if not any((Path(f) / header).exists() for f in folders):
            pytest.skip(f"no {header}: nothing of CUDA can be compiled here")
    text = next(t for f in folders for t in Path(f).glob("cuda_runtime_api.h")).read_text()
    version = int(re.search(r"#define CUDART_VERSION\s+(\d+)", text)[1])
    if version < 13000:
        pytest.skip(f"headers of CUDA {version}: torch's runtime is that of 13")
    target = tmp_path_factory.mktemp("software_gpu") / "both.so"
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(target)]
    command += [f for folder in folders for f in ("-isystem", folder)]
    sources = [str(SOURCES / name) for name in ("runtime.c", "driver.c")]
    done = subprocess.run([*command, *sources, "-ldl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


def test_memory_is_the_hosts(library):
    memory, back = ctypes.c_void_p(), torch.zeros(1000)
    want = torch.randn(1000)
    assert library.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(4000)) == 0
    assert memory.value % 512 == 0  # as torch's allocator assumes
    size = ctypes.c_size_t(4000)
    assert library.cudaMemcpy(memory, ctypes.c_void_p(want.data_ptr()), size, 1) == 0
    assert library.cudaMemcpy(ctypes.c_void_p(back.data_ptr()), memory, size, 2) == 0
    assert torch.equal(back, want)
    assert library.cudaMemsetAsync(memory, 0, size, None) == 0
    assert not any(ctypes.string_at(memory.value, 4000))
    assert library.cudaFree(memory) == 0


def test_more_memory_than_there_is(library):
    assert library.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(1 << 60)) == 2


def test_it_says_it_is_a_hopper_by_another_name(library):
    value, properties = ctypes.c_int(), ctypes.create_string_buffer(4096)
    assert library.cudaGetDeviceProperties(properties, 0) == 0
    assert properties.value == b"Software GPU"
    for attribute, want in ((75, 9), (76, 0), (97, 232448), (16, 132)):
        assert library.cudaDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0
        assert value.value == want
    assert library.cudaSetDevice(0) == 0 and library.cudaSetDevice(1) == 101


def test_events_tell_the_time(library):
    events, ms = [ctypes.c_void_p() for _ in range(2)], ctypes.c_float()
    for event in events:
        assert library.cudaEventCreate(ctypes.byref(event)) == 0
        assert library.cudaEventRecord(event, None) == 0
    first, last = events
    times = []
    for _ in range(2):
        assert library.cudaEventRecord(last, None) == 0
        assert library.cudaEventElapsedTime(ctypes.byref(ms), first, last) == 0
        times.append(ms.value)
        torch.randn(1000, 1000)
    assert 0 < times[0] < times[1]


def test_a_capture_is_seen_and_ends(library):
    status, graph = ctypes.c_int(-1), ctypes.c_void_p()
    for begin, want in ((False, 0), (True, 1)):
        if begin:
            library.cudaStreamBeginCapture(None, 0)
        library.cudaStreamIsCapturing(None, ctypes.byref(status))
        assert status.value == want
    assert library.cudaStreamEndCapture(None, ctypes.byref(graph)) == 0 and graph.value
    library.cudaStreamIsCapturing(None, ctypes.byref(status))
    assert status.value == 0


BFLOAT16, PLAIN, SWIZZLED = 9, 0, 3
FAULTS = [
    ("nothing", {}), ("alignment", {"address": 0x1008}), ("stride", {"stride": 130}),
    ("box", {"box": (64, 257)}), ("row of the box", {"box": (4, 64)}), ("size", {"sizes": (64, 0)}),
    ("rank", {"rank": 6}), ("swizzle", {"box": (128, 64)}), ("step", {"step": 9}),
]  # fmt: skip


@pytest.mark.parametrize(("what", "change"), FAULTS, ids=[f[0] for f in FAULTS])
def test_a_tensor_map_is_refused_by_the_drivers_rules(library, what, change):
    asked = {"address": 0x1000, "rank": 2, "sizes": (64, 64), "stride": 128, "box": (64, 64),
             "step": 1, **change}  # fmt: skip
    sizes = (ctypes.c_uint64 * 5)(*asked["sizes"])
    box, steps = (ctypes.c_uint32 * 5)(*asked["box"]), (ctypes.c_uint32 * 5)(*[asked["step"]] * 2)
    found = library.cuTensorMapEncodeTiled(
        ctypes.create_string_buffer(128), BFLOAT16, asked["rank"],
        ctypes.c_void_p(asked["address"]), sizes, (ctypes.c_uint64 * 4)(asked["stride"]), box,
        steps, PLAIN, SWIZZLED, 0, 0,
    )  # fmt: skip
    assert found == (0 if what == "nothing" else 1)
