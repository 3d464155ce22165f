"""The short table at the end of a run, from the records of its journal."""

from __future__ import annotations

from collections import Counter
from statistics import geometric_mean

from gpu.suites import SUITES
from gpu.sweep import key_of

LINE = 150  # characters of a reason


def report(records: list[dict], suites: list[str]) -> str:
    """What failed, every point, and last a line for each suite."""
    lines = []
    tests = [r for r in records if r.get("type") == "test"]
    for record in records:
        if "failed" in record:
            lines.append(
                f"FAILED {record.get('key', record.get('type'))}: {_cut(record['failed'])}"
            )
    points = [r for r in records if r.get("type") == "point"]
    measured = [p for p in points if "speedup" in p]
    lines += ["", *_aligned([HEAD, *(_row(p) for p in measured)])] if measured else []
    lines += ["", *_left_out(measured)]
    if tests:
        kinds = ("passed", "failed", "died", "not collected", "skipped")
        counts = {kind: sum(t["outcome"] == kind for t in tests) for kind in kinds}
        counts["not reached in time"] = len(_unreached(records))
        lines += _skipped(tests)
        lines.append("tests: " + ", ".join(f"{n} {kind}" for kind, n in counts.items() if n))
    lines += [_of_suite(name, points) for name in suites]
    return "\n".join(lines)


HEAD = (
    "suite",
    "case",
    "pattern",
    "zeros",
    "dtype",
    "dense us",
    "ours us",
    "gain",
    "goal",
    "peer",
    "way",
)


def _row(p: dict) -> tuple[str, ...]:
    dense, ours = (p["sides"][p[f"best_{role}"]]["median_ms"] for role in ("dense", "ours"))
    peer = p.get("speedup_over_peer")
    chosen = f" [{p['format']}]" if "format" in p else ""
    return (
        p["suite"], p["case"] + chosen, p["pattern"], f"{p['sparsity']:.0%}", p["dtype"],
        f"{1e3 * dense:.1f}", f"{1e3 * ours:.1f}", f"{p['speedup']['median']:.2f}",
        f"{p['goal']:.2f}{'' if met(p) else ' missed'}" if p["goal"] else "",
        f"{peer['median']:.2f}" if peer else "",
        " ".join(dict.fromkeys(p.get("ways", {}).values())),
    )  # fmt: skip


def _skipped(tests: list[dict]) -> list[str]:
    """Reasons why tests were skipped, with how many."""
    reasons = Counter(_cut(t.get("reason", "")) for t in tests if t["outcome"] == "skipped")
    return [f"skipped {n} tests: {reason}" for reason, n in reasons.items()]


def _unreached(records: list[dict]) -> set[str]:
    """Tests that were collected last and that no process came to."""
    collected = [r["tests"] for r in records if r.get("type") == "collected"]
    return set(collected[-1] if collected else ()) - {r.get("key") for r in records}


def met(p: dict) -> bool:
    """Whether a point reached its goal."""
    return "speedup" in p and p["speedup"]["median"] >= p["goal"]


def _left_out(points: list[dict]) -> list[str]:
    """Each side that was left out anywhere, once per reason."""
    seen: dict[str, int] = {}
    for p in points:
        reasons = dict(p.get("left_out", {}))
        for op, failed in p.get("ways_left_out", {}).items():
            reasons |= {f"{op.split()[0]} by {way}": why for way, why in failed.items()}
        for name, why in reasons.items():
            text = f"left out: {name}: {_cut(why)}"
            seen[text] = seen.get(text, 0) + 1
    return [f"{text} ({n} points)" for text, n in seen.items()]


def _of_suite(name: str, points: list[dict]) -> str:
    mine = [p for p in points if p.get("suite") == name]
    gains = [p["speedup"]["median"] for p in mine if "speedup" in p]
    aimed = [p for p in mine if p.get("goal")]
    wanted = {key_of(name, work) for work in SUITES[name][0]()}
    missing = len(wanted - {p["key"] for p in mine})
    text = f"{name}: {len(gains)} of {len(wanted)} points"
    if gains:
        text += f", gain {geometric_mean(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})"
    if aimed:
        text += f", goal met {sum(map(met, aimed))} of {len(aimed)}"
    failed = sum("failed" in p for p in mine)
    text += f", {failed} failed" if failed else ""
    return text + (f", {missing} not reached in time" if missing else "")


def _cut(text: str) -> str:
    one = " / ".join(line.strip() for line in text.strip().splitlines())
    return one if len(one) <= LINE else one[: LINE - 3] + "..."


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
