"""Runs cases in a process that may die: each is noted before it starts."""

import importlib
import json
import random
import resource
import sys
import time
import warnings

MEMORY = 3 << 30  # bytes beyond what the process has when it starts


def generator(target: str, seed: int, case: int) -> random.Random:
    """Random numbers of one case, the same whenever it is run."""
    return random.Random(f"{target} {seed} {case}")


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def work(target: str, seed: int, first: int, end: int, until: float, notes) -> None:
    """Run cases [first, end) until a time; writes a line before and after each."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run = importlib.import_module(f"fuzz.{target}").run
    run(generator(target, seed, -1))  # loads what it needs before memory is limited
    _limit_memory()
    for case in range(first, end):
        if time.monotonic() > until:
            return
        torch.manual_seed(case)
        print(json.dumps({"case": case}), file=notes, flush=True)
        label, fault = run(generator(target, seed, case))
        if fault:
            print(
                json.dumps({"case": case, "label": label, "fault": fault}), file=notes, flush=True
            )
    print(json.dumps({"end": end}), file=notes, flush=True)


if __name__ == "__main__":
    name, *numbers, deadline = sys.argv[1:]
    work(name, *map(int, numbers), float(deadline), sys.stdout)
