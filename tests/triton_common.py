"""Triton without a GPU: kernels compiled ahead of time, and how the interpreter is run.

Two kinds of proof, in two kinds of processes:

- `compile_for` compiles a kernel to machine code for a named GPU and reads what it uses. It needs a
  process without TRITON_INTERPRET, where every test outside of `tests/interpreted` runs.
- Tests in `tests/interpreted` launch kernels on CPU tensors. Triton decides when a kernel is
  defined, so they run in a pytest of their own, which `test_interpreted.py` starts.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

# Compute capability -> bytes of shared memory that one program can have (CUDA C++ Programming
# Guide, table of technical specifications: the maximum per thread block).
SHARED_LIMIT = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Compiled:
    """A kernel as the named GPU would run it.

    Attributes:
        name: Name of the kernel.
        cap: Compute capability times ten: 80, 90, 100.
        shared: Bytes of shared memory of one program.
        asm: Text or bytes by stage: `ttir`, `ttgir`, `llir`, `ptx`, `cubin`.
    """

    name: str
    cap: int
    shared: int
    asm: dict

    @property
    def ptx(self) -> str:
        """The PTX, to look for `wgmma`, `cp.async` or the width of loads."""
        return self.asm["ptx"]

    @cached_property
    def usage(self) -> dict[str, int]:
        """What `cuobjdump -res-usage` says of the cubin: REG, STACK, LOCAL, SHARED, ..."""
        said = _on_cubin("cuobjdump", "-res-usage", self.asm["cubin"])
        return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", said)}

    @property
    def registers(self) -> int:
        """Registers of one thread."""
        return self.usage["REG"]

    @property
    def spills(self) -> int:
        """Bytes of stack and local memory of one thread: 0 where everything stays in registers."""
        return self.usage["STACK"] + self.usage["LOCAL"]

    @cached_property
    def sass(self) -> str:
        """The machine code, one instruction a line, to count what an inner loop costs."""
        return _on_cubin("nvdisasm", "-c", self.asm["cubin"])

    def check(self, spills: int = 0) -> "Compiled":
        """Assert that it can be launched and keeps its values in registers; returns itself."""
        limit = SHARED_LIMIT[self.cap]
        # Triton compiles kernels that need more than the GPU has; only the launch would fail.
        assert self.shared <= limit, f"{self.name}: {self.shared} bytes of shared memory > {limit}"
        assert self.spills <= spills, f"{self.name}: {self.spills} bytes spilled > {spills}"
        return self


def compile_for(kernel, types: dict, constants: dict, cap: int = 90, **options) -> Compiled:
    """Compile a Triton kernel for a GPU that need not be there.

    Args:
        kernel: What `triton.jit` returned, or one of `triton.autotune` / `triton.heuristics`
            around it.
        types: Type of every argument that is no constant: `*bf16`, `*fp16`, `*fp32`, `*i32`,
            `*i64`, `i32`, `i64`, `fp32`, `tensordesc<fp16[64, 64]>`. Pointers count as aligned to
            16 bytes, as torch allocates them.
        constants: Values of the `tl.constexpr` arguments and of arguments that are always None.
        cap: Compute capability times ten: 75, 80, 86, 89, 90, 100.
        options: `num_warps`, `num_stages`, ... as for a launch.

    Returns:
        The compiled kernel; `.check()` asserts shared memory and spills.

    Raises:
        ValueError: an argument that is in neither or both of `types` and `constants`.
        triton.CompilationError: types or shapes that do not fit.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = unwrapped(kernel)
    names = kernel.arg_names
    for name in names:
        if (name in types) == (name in constants):
            where = "both" if name in types else "neither"
            raise ValueError(
                f"compile_for: expected {name} of {kernel.__name__} in types or in constants, "
                f"got it in {where}"
            )
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={n: constants[n] for n in names if n in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", cap, 32), options=options)
    return Compiled(kernel.__name__, cap, built.metadata.shared, dict(built.asm))


def unwrapped(kernel):
    """The jitted function inside of `autotune` and `heuristics`."""
    from triton.runtime.jit import JITFunction

    while not isinstance(kernel, JITFunction):
        if not hasattr(kernel, "fn"):
            raise TypeError(
                "compile_for: expected a kernel of triton.jit in a process without "
                f"TRITON_INTERPRET, got {type(kernel).__name__}"
            )
        kernel = kernel.fn
    return kernel


def _on_cubin(tool: str, flag: str, cubin: bytes) -> str:
    """Output of a binary utility that comes with Triton."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [program, flag, file.name], capture_output=True, text=True, check=True
        ).stdout
