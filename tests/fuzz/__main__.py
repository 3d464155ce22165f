"""`python -m fuzz`: run targets by hand and print what they find."""

import argparse
import sys
from collections import Counter

from .campaign import TARGETS, campaign


def main() -> int:
    """Run; the exit status is 1 when something was found."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--case", type=int, help="run this one alone")
    options = parser.parse_args()
    found = 0
    for target in TARGETS if options.target == "all" else (options.target,):
        one = options.case is not None
        first, cases = (options.case, 1) if one else (0, options.cases)
        outcome = campaign(target, options.seed, cases, options.seconds, first)
        found += len(outcome.findings)
        print(f"{target}: {outcome.cases} cases, {len(outcome.findings)} findings")
        kinds = Counter(fault[:60] for _, _, fault in outcome.findings)
        for kind, count in kinds.most_common():
            print(f"  {count:6} {kind}")
        for case, label, fault in outcome.findings[:40]:
            print(f"  --target {target} --seed {options.seed} --case {case}: {label}: {fault}")
    return int(found > 0)


sys.exit(main())
