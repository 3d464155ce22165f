"""Measures what the machine can do at most, so that results can be given in percent of it.

`python bench/peaks.py` prints the limits of every instruction set this CPU has.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sparsekern.measure import hardware

SOURCE = Path(__file__).with_name("peaks.cpp")
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-pthread")
# Widest first; an instruction set is there if the CPU has all features on its left.
ISAS = {
    "avx512": (("avx512f",), ("-mavx512f", "-mprefer-vector-width=512")),
    "avx2": (("avx2", "fma"), ("-mavx2", "-mfma")),
    "baseline": ((), ()),
}


def isas() -> list[str]:
    """Instruction sets of this CPU, the widest first; `baseline` is what the compiler assumes."""
    have = hardware()["isa"]
    return [name for name, (needs, _) in ISAS.items() if all(n in have for n in needs)]


def measure(threads: int, seconds: float = 0.3, isa: str | None = None) -> dict[str, object]:
    """Compile `peaks.cpp` into a temporary folder and run it.

    Args:
        threads: How many cores work at once; rates are their sum.
        seconds: Duration of each of the six measurements.
        isa: One of `isas()`; None for the widest.

    Returns:
        `isa`, `threads`, `vector_bits`, `fma_gflops` (registers), `fma_l1_gflops` and
        `fma_l2_gflops` (one operand of each FMA from that cache), `load_l1_gb_s`, `load_l2_gb_s`,
        `load_memory_gb_s` and the buffer sizes; or only `unavailable` with the reason.
    """
    isa = isa or isas()[0]
    compiler = _compiler()
    if compiler is None:
        return {"unavailable": "no C++ compiler found ($CXX, c++, g++, clang++)"}
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "peaks")
        build = [*compiler, *FLAGS, *ISAS[isa][1], str(SOURCE), "-o", program]
        try:
            subprocess.run(build, check=True, capture_output=True, text=True)
            run = [program, str(threads), str(seconds)]
            out = subprocess.run(run, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            return {"unavailable": f"{compiler[0]}: {detail[0] if detail else 'failed'}"}
    return {"isa": isa, **json.loads(out.stdout)}


def _compiler() -> list[str] | None:
    if os.environ.get("CXX"):
        return os.environ["CXX"].split()
    names = ("c++", "g++", "clang++")
    return next(([path] for name in names if (path := shutil.which(name))), None)


def main(arguments: list[str] | None = None) -> int:
    """Print one JSON line per instruction set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement")
    options = parser.parse_args(arguments)
    for isa in isas():
        print(json.dumps(measure(options.threads, options.seconds, isa)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
