"""What the tests on a GPU need besides, where the GPU is software: see README.md.

Each way that `run_fastest` would time runs once and is compared with the dense one; the end of the
run says which ones ran, were too long, or cannot be judged.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter

import pytest
import torch
from triton.runtime import interpreter

from sparsekern.ops import own_check

PROGRAMS = int(os.environ.get("SOFTWARE_GPU_PROGRAMS", "400"))  # of a launch within `run_fastest`
CONFIGS = int(os.environ.get("SOFTWARE_GPU_CONFIGS", "2"))  # of a block kernel, by call
CLOSE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# These compute by compiled code, not by the interpreter, whose bfloat16 does not round.
COMPILED = ("cus", "mma", "gather", "2:4")
BFLOAT16 = "the interpreter has no bfloat16 arithmetic"
LEFT_OUT = {  # by the beginning of a test's name
    r"a_cuda_graph_holds_the_forward_pass": "a replay does nothing: new inputs stay unseen",
    r"a_graph_sees_a_new_weight": "a replay does nothing: new weights stay unseen",
    r"two_threads": "the interpreter runs one kernel at a time",
    r"compiled_model_has_no_break": "inductor's own kernels are compiled and do nothing",
    r"quantized_2_of_4.dynamic.*float8": "the interpreter does not round to float8",
    r"8_bits.*float8.*True": "the interpreter does not round to float8",
    r"(csr|nm|convolutions|8_bits|pruned_at_every_call)\[.*bfloat16": BFLOAT16,
}

RUN: Counter = Counter()
TOO_LONG: Counter = Counter()
NOT_JUDGED: Counter = Counter()
FAULTS: Counter = Counter()
timing = [False]  # inside of `run_fastest`


class TooLong(Exception):
    """A launch of more programs than are worth interpreting."""


def limited(launch):
    """The interpreter's launch, refused inside of `run_fastest` where it would take too long."""

    def call(self, *arguments, **options):
        grid = self.grid if not callable(self.grid) else ()
        if timing[0] and torch.Size(grid).numel() > PROGRAMS:
            raise TooLong
        return launch(self, *arguments, **options)

    return call


interpreter.GridExecutor.__call__ = limited(interpreter.GridExecutor.__call__)


def run_all(key, ways, like):
    """In the place of `run_fastest`: the dense result, once all others have been compared to it."""
    dense, wrong, configs = ways["dense"](), [], 0
    for name, way in ways.items():
        configs += name.startswith("SpmmConfig")
        if name == "dense" or (name.startswith("SpmmConfig") and configs > CONFIGS):
            continue
        what = f"{key[0]} by {name.split('(')[0]}, {like.dtype}"
        fault = trial(what, name, way, dense)
        if fault:
            FAULTS[f"{what}: {fault}"] += 1
            wrong.append(f"{what}: {fault}")
    assert not wrong, "\n".join(wrong)
    return dense


def trial(what, name, way, dense):
    """What is wrong with a way, nothing if it is fine."""
    timing[0] = True
    try:
        got = way()
    except TooLong:
        TOO_LONG[what] += 1
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        timing[0] = False
    RUN[what] += 1
    if (got.dtype, got.shape) != (dense.dtype, dense.shape):
        return f"expected {dense.dtype} {dense.shape}, got {got.dtype} {got.shape}"
    want, got = (t.detach().cpu().double() for t in (dense, got))
    gap = float((got - want).norm() / want.norm().clamp_min(1e-30))
    if gap <= CLOSE[dense.dtype]:
        return ""
    if dense.dtype == torch.bfloat16 and not name.startswith(COMPILED):
        NOT_JUDGED[what] += 1
        return ""
    return f"off by {gap:.2g}"


@pytest.fixture(autouse=True)
def _software_gpu(monkeypatch):
    monkeypatch.setattr(own_check, "TOKENS", (4,))  # each takes seconds
    for name, module in list(sys.modules.items()):
        if name.startswith("sparsekern.ops.") and hasattr(module, "run_fastest"):
            monkeypatch.setattr(module, "run_fastest", run_all)


def pytest_collection_modifyitems(items):
    """Leave out what cannot hold here, each with its reason."""
    for item in items:
        for pattern, reason in LEFT_OUT.items():
            if re.match(f"test_{pattern}", item.name):
                item.add_marker(pytest.mark.skip(reason=f"software GPU: {reason}"))


def pytest_terminal_summary(terminalreporter):
    """All ways that were met."""
    found = {"run": RUN, "too long": TOO_LONG, f"not judged, {BFLOAT16}": NOT_JUDGED,
             "failed": FAULTS}  # fmt: skip
    for title, counts in found.items():
        terminalreporter.section(f"ways {title}: {sum(counts.values())}")
        for what, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count:6d} {what}")
