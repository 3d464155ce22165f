"""Compiling ahead of time: what the report says is what the kernel does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from triton_common import Compiled, compile_for  # noqa: E402


@triton.jit
def product(a, b, out, k, SIZE: tl.constexpr, STEP: tl.constexpr):
    row, col, step = tl.arange(0, SIZE), tl.arange(0, SIZE), tl.arange(0, STEP)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, k, STEP):
        left = tl.load(a + row[:, None] * k + start + step[None, :])
        right = tl.load(b + (start + step[:, None]) * SIZE + col[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + row[:, None] * SIZE + col[None, :], total.to(out.dtype.element_ty))


TYPES = {"a": "*bf16", "b": "*bf16", "out": "*bf16", "k": "i32"}
SIZES = {"SIZE": 64, "STEP": 64}


@pytest.mark.parametrize(
    ("cap", "instruction"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")]
)
def test_compiles_for_a_gpu_that_is_not_there(cap, instruction):
    built = compile_for(product, TYPES, SIZES, cap, num_warps=4, num_stages=3).check()
    assert instruction in built.ptx and built.cap == cap
    assert 16 < built.registers <= 255 and built.spills == 0
    assert built.shared >= 2 * 64 * 64 * 2  # one stage of both operands, 2 bytes each


def test_wrappers_are_taken_off():
    tuned = triton.autotune([triton.Config({}, num_warps=4)], key=["k"])(product)
    built = compile_for(tuned, TYPES, SIZES, 80)
    assert built.name == "product" and "mma" in built.sass.lower()


def test_check_refuses_what_cannot_be_launched_or_spills():
    with pytest.raises(AssertionError, match="product: 300000 bytes of shared memory > 232448"):
        Compiled("product", 90, 300_000, {}).check()
    spilled = Compiled("product", 90, 1024, {})
    spilled.__dict__["usage"] = {"REG": 255, "STACK": 8, "LOCAL": 16}
    with pytest.raises(AssertionError, match="product: 24 bytes spilled > 0"):
        spilled.check()


@pytest.mark.parametrize(
    ("types", "constants", "where"),
    [({**TYPES, "STEP": "i32"}, SIZES, "both"), (TYPES, {"SIZE": 64}, "neither")],
)
def test_every_argument_is_a_type_or_a_constant(types, constants, where):
    message = f"expected STEP of product in types or in constants, got it in {where}"
    with pytest.raises(ValueError, match=message):
        compile_for(product, types, constants)


INTERPRETED = """
import triton
from triton_common import compile_for

@triton.jit
def kernel(x):
    pass

compile_for(kernel, {"x": "*fp32"}, {})
"""


def test_interpreted_kernels_cannot_be_compiled(tmp_path):
    (tmp_path / "script.py").write_text(INTERPRETED)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
    )
    message = "expected a kernel of triton.jit in a process without TRITON_INTERPRET, got"
    assert done.returncode and message in done.stderr, done.stderr
