"""`dry.py --sweeps`: the harness of `make gpu`, where kernels do nothing and products are zeros."""

import sys

import cases
from gpu import __main__ as harness
from gpu import sweep
from gpu.suites import SUITES
from gpu.supervise import supervise


def supervised(command, *rest):
    """A suite in its own process, as there, by way of this file."""
    return supervise([command[0], __file__, "--points", *command[3:]], *rest)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--points"]:
        cases.Problem.reference = lambda problem: ()  # nothing to compare with
        sys.exit(sweep.main(sys.argv[2:]))
    harness.supervise = supervised
    # The caller's `--suite` comes last, and wins.
    sys.exit(harness.main(["--no-build", "--suite", *SUITES, *sys.argv[1:]]))
