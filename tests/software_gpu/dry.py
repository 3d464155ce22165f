"""`make gpu-dry`: the tests marked `gpu` on a GPU made of software, see README.md.

python tests/software_gpu/dry.py                                # all: an hour or more
python tests/software_gpu/dry.py tests/gpu/test_gpu_ops.py -k float32   # arguments of pytest
python tests/software_gpu/dry.py --sweeps --suite block         # of `python -m gpu`
"""

from __future__ import annotations

import os
import sys

from build import HERE, HOME, PYTHON, TREE, build, nvidia

TESTS = (
    *("-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-m", "gpu", "--tb=short", "-rs"),
    *("-W", "ignore::DeprecationWarning:triton.runtime.interpreter"),
)


def main(arguments: list[str]) -> None:
    """Build what is missing, then become pytest or the sweeps."""
    build()
    paths = (TREE, TREE / "bench", HERE)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TRITON_LIBCUDA_PATH": str(nvidia() / "cu13/lib"),
        "TRITON_CACHE_DIR": str(HOME / "triton"),
    }
    if arguments[:1] == ["--sweeps"]:
        environment["SOFTWARE_GPU_SKIP"] = "1"
        command = [str(HERE / "sweeps.py"), "--out", str(HOME / "results"), *arguments[1:]]
    else:
        environment["TRITON_INTERPRET"] = "1"
        named = any(not a.startswith("-") and (TREE / a.split("::")[0]).exists() for a in arguments)
        command = [*TESTS, *arguments, *(() if named else ("tests/gpu",))]
    os.chdir(TREE)
    os.execve(PYTHON, [str(PYTHON), *command], environment)


if __name__ == "__main__":
    main(sys.argv[1:])
