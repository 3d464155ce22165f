"""Makes an environment for each peer: `python bench/peers/install.py deepsparse onnxruntime`.

Peers pin versions that contradict each other and ours, so each lives in a venv of its own, beside
this file and ignored by git. Nothing but the benchmarks needs them. Look at their licences first:
DeepSparse may be used for evaluation only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
READY = ".ready"  # holds the packages of a finished environment

ONNX = "onnx==1.23.2"
# Steps of pip, in order. `--no-build-isolation` where a build must see the torch beside it.
PEERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "deepsparse": (("deepsparse==1.8.0", "numpy==1.26.4", "onnx==1.14.1", "setuptools<81"),),
    "onnxruntime": (("onnxruntime==1.31.1", ONNX),),
    "openvino": (("openvino==2026.4.1", ONNX),),
    "sparseprop": (
        ("torch==2.13.0",),
        ("numpy==2.4.6", "scipy==1.17.1", "pybind11==3.1.0", "setuptools<81", "wheel"),
        ("--no-build-isolation", "--no-deps", "sparseprop==0.1.14"),
    ),
    # No peer, but what writes whole models as ONNX files for the three engines above.
    "onnx": ((ONNX,),),
}


def main(arguments: list[str] | None = None) -> int:
    """Install the named peers; returns the exit status."""
    parser = argparse.ArgumentParser(prog="install", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"of {', '.join(PEERS)} (default: all)")  # fmt: skip
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in PEERS]
    if unknown:
        parser.error(f"expected names of {', '.join(PEERS)}, got {', '.join(unknown)}")
    failed = []
    for name in options.names or PEERS:
        try:
            if installed(name):
                print(f"{name}: already there")
                continue
            install(name)
            print(f"{name}: installed into {folder(name)}")
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name}: failed, {_reason(error)}", file=sys.stderr)
    return 1 if failed else 0


def folder(name: str) -> Path:
    """Where the environment of a peer is."""
    return FOLDER / f".venv-{name}"


def python(name: str) -> Path:
    """The interpreter of a peer."""
    return folder(name) / "bin" / "python"


def installed(name: str) -> bool:
    """Whether the environment is finished and holds the versions named above."""
    ready = folder(name) / READY
    return ready.exists() and ready.read_text(encoding="utf-8") == _packages(name)


def command(name: str) -> str:
    """What a user types to get a peer."""
    return f"python bench/peers/install.py {name}"


def install(name: str) -> None:
    """Make the environment anew.

    Raises:
        subprocess.CalledProcessError: venv or pip failed; its output is in the error.
    """
    shutil.rmtree(folder(name), ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder(name))])
    # Builds look for `python` on the path.
    environment = {**os.environ, "PATH": f"{python(name).parent}{os.pathsep}{os.environ['PATH']}"}
    for step in PEERS[name]:
        _run([str(python(name)), "-m", "pip", "install", *step], environment)
    (folder(name) / READY).write_text(_packages(name), encoding="utf-8")


def _packages(name: str) -> str:
    return "\n".join(" ".join(step) for step in PEERS[name])


def _run(arguments: list[str], environment: dict[str, str] | None = None) -> None:
    subprocess.run(
        arguments, env=environment, check=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _reason(error: subprocess.CalledProcessError) -> str:
    """The first line of the output that names an error, else the last one."""
    lines = [line.strip() for line in (error.stdout or "").splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower()]
    return (named or lines[-1:] or [str(error)])[0]


if __name__ == "__main__":
    sys.exit(main())
