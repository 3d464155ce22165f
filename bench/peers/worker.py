"""One peer in its own process: requests as JSON lines on stdin, answers on stdout.

Started by `client.py` with the interpreter of the peer's environment. Requests:

    {"do": "build", "engine": ..., "arrays": FILE.npz, "job": {...}}  ->  {"version": ...}
    {"do": "time", "calls": N}                                        ->  {"seconds": ...}
    {"do": "result", "path": FILE.npz}                                ->  {}

Whatever fails is answered with {"error": ...}. The clock runs here, so that the pipe is not timed.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time

import engines
import numpy as np


def main() -> None:
    """Answer until stdin ends."""
    # Engines print banners; they go to stderr, so that stdout carries nothing but answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            request = json.loads(line)
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Worker:
    """The call that was built, if any."""

    def __init__(self):
        self.call = None

    def build(self, engine: str, arrays: str, job: dict) -> dict:
        with np.load(arrays) as found:
            data = dict(found)
        self.call, version = engines.ENGINES[engine](engines.Job(arrays=data, **job))
        return {"version": version}

    def time(self, calls: int) -> dict:
        call = self.call
        gc.disable()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds = time.perf_counter() - start
        gc.enable()
        return {"seconds": seconds}

    def result(self, path: str) -> dict:
        arrays = [y.detach().numpy() if hasattr(y, "detach") else y for y in self.call()]
        np.savez(path, *arrays)
        return {}


if __name__ == "__main__":
    main()
