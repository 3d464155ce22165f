"""The command `sparsekern`: `doctor` looks at the installation, `bench` prunes and measures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsekern.measure.models import MODELS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None takes them from the command line.

    Returns:
        0 when all went well; 1 for an error at run time, and for `doctor` when the compiled CPU
        kernels are missing; 130 when interrupted. Bad arguments end the process with 2.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("sparsekern: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, ImportError, OSError) as error:
        if arguments.traceback:
            raise
        print(f"sparsekern {arguments.command}: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparsekern", description="Pruned PyTorch networks that really run faster."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is installed, what is missing and why")
    doctor.set_defaults(run=_run_doctor)
    bench = commands.add_parser(
        "bench",
        help="prune a model at several sparsities and time it against its dense self",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.set_defaults(run=_run_bench)
    _add_bench_arguments(bench)
    for command in (doctor, bench):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
        command.add_argument("--traceback", action="store_true", help="show where an error arose")
    return parser


def _add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    add = bench.add_argument
    add("--model", default="mlp", help=f"{', '.join(MODELS)}, or module:callable")
    add("--method", default="magnitude", help="pruning method")
    add("--pattern", nargs="+", type=_pattern, default=["unstructured"],
        help="unstructured, N:M, block:RxC, filter ...")  # fmt: skip
    add("--sparsity", nargs="+", type=_sparsity, default=[0.8, 0.9],
        help="shares of zeros in [0, 1); an N:M pattern has its own")  # fmt: skip
    add("--scope", default=None, help="uniform, global or erk; None: the method's own")
    add("--batch", nargs="+", type=_positive, default=[8], help="samples per forward pass")
    add("--seq", type=_positive, default=128, help="tokens per sample, for language models")
    add("--threads", type=_positive, default=None, help="CPU threads; default: torch's choice")
    add("--budget", type=_seconds, default=2.0, help="seconds of timing per configuration")
    add("--energy", choices=("measured", "modelled", "none"), default="measured",
        help="modelled: an estimate, labelled so, where no counter can be read")  # fmt: skip
    add("--out", type=Path, default=Path("reports"), help="folder for the JSON and HTML report")


def _pattern(text: str) -> str:
    from sparsekern.patterns import parse

    try:
        return str(parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _sparsity(text: str) -> float:
    value = _number(text, float)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a sparsity in [0, 1), got {text}")
    return value


def _positive(text: str) -> int:
    value = _number(text, int)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def _seconds(text: str) -> float:
    value = _number(text, float)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text}")
    return value


def _number(text: str, kind):
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from None


def _run_doctor(arguments) -> int:
    from sparsekern.doctor import doctor

    diagnosis = doctor(quiet=arguments.json)
    if arguments.json:
        print(json.dumps(diagnosis, indent=2))
    return 0 if diagnosis.ok else 1


def _run_bench(arguments) -> int:
    from sparsekern.measure.sweep import BenchSettings, run_sweep

    settings = BenchSettings(
        model=arguments.model,
        method=arguments.method,
        patterns=tuple(arguments.pattern),
        sparsities=tuple(arguments.sparsity),
        scope=arguments.scope,
        batches=tuple(arguments.batch),
        seq=arguments.seq,
        threads=arguments.threads,
        budget_s=arguments.budget,
        energy=arguments.energy,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)  # before the work, so a bad folder costs none
    result = run_sweep(settings)
    print(result.to_json() if arguments.json else result.table())
    for path in result.write(arguments.out):
        print(f"wrote {path}", file=sys.stderr)
    return 0
