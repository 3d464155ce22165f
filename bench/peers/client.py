"""The parent's side of a peer: starts its worker, hands it a job, asks it for times and results."""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from peers import install
from torch import Tensor

WORKER = Path(__file__).with_name("worker.py")
# Name -> how results call it: the engines that gain nothing from zeros say so.
ENGINES = {
    "deepsparse": "deepsparse",
    "sparseprop": "sparseprop",
    "onnxruntime": "onnxruntime dense",
    "openvino": "openvino dense",
}
TRAINERS = ("sparseprop",)
TIMEOUT_S = 300.0  # per answer; compiling a whole model takes some of them a minute


class PeerError(RuntimeError):
    """A peer that is not installed, cannot do the job, or died.

    Attributes:
        peer: The one that failed, if it had started.
    """

    peer: Peer | None = None


class Peer:
    """One engine with one job, in a process of its own until `close`."""

    def __init__(self, name: str, job: dict, arrays: dict[str, Tensor]):
        """Start the worker and build the job.

        Args:
            name: One of `ENGINES`.
            job: The fields of `engines.Job` but the arrays.
            arrays: Inputs and weights by name, float32 or int64.

        Raises:
            PeerError: the peer is not installed (the message holds the command that installs it)
                or cannot build the job.
        """
        if not install.installed(name):
            raise PeerError(f"not installed: {install.command(name)}")
        if job.get("training") and name not in TRAINERS:
            raise PeerError("runs the forward pass only")
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        self._log = open(Path(self._folder.name) / "log", "w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [str(install.python(name)), str(WORKER)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        try:
            path = Path(self._folder.name) / "job.npz"
            np.savez(path, **{key: tensor.numpy() for key, tensor in arrays.items()})
            found = self._ask({"do": "build", "engine": name, "arrays": str(path), "job": job})
            path.unlink()
            self.version = found["version"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def sample(self, calls: int) -> float:
        """Seconds that `calls` calls in a row took, by the worker's own clock."""
        try:
            return self._ask({"do": "time", "calls": calls})["seconds"]
        except PeerError as error:
            error.peer = self
            raise

    def result(self) -> tuple[Tensor, ...]:
        """What one call returns."""
        path = Path(self._folder.name) / "result.npz"
        self._ask({"do": "result", "path": str(path)})
        with np.load(path) as found:
            arrays = [found[key] for key in found.files]
        path.unlink()
        return tuple(torch.from_numpy(array) for array in arrays)

    def close(self) -> None:
        """End the process; a second time does nothing."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # a request that was not read
            self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def _ask(self, request: dict) -> dict:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        if not select.select([self._process.stdout], [], [], TIMEOUT_S)[0]:
            raise PeerError(f"no answer to {request['do']} within {TIMEOUT_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError((answer["error"].strip().splitlines() or ["failed"])[0])
        return answer

    def _died(self) -> PeerError:
        status = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return PeerError(f"its process ended with status {status}: {(lines or ['no output'])[-1]}")
