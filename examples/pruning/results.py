"""Results as points of lines, whatever experiment they come from."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from records import Records


class Point(NamedTuple):
    """One figure of one network.

    Attributes:
        line: What was done to the network.
        sparsity: Share of zeros that was asked for.
        seed: Of weights and data order.
        metric: `"accuracy"` after all training, `"pruned"` right after pruning, both in percent of
            the test images; `"rise"` of the training loss by pruning, in percent of it.
        value: The number.
    """

    line: str
    sparsity: float
    seed: int
    metric: str
    value: float


def points(records: Records, suffix: Callable[[dict], str] = lambda key: "") -> list[Point]:
    """All points of a file; `suffix` gives the end of a line's name from the record's key."""
    found = []
    for record in records.done.values():
        key = record["key"]
        for point in record.get("points", [{**record, **key}]):
            place = point["line"] + suffix(key), round(point["sparsity"], 4), key["seed"]
            for metric in ("accuracy", "pruned", "rise"):
                if point.get(metric) is not None:
                    found.append(Point(*place, metric, point[metric]))
    return found


def series(
    found: Iterable[Point], line: str, metric: str = "accuracy"
) -> dict[float, tuple[float, float, int]]:
    """Mean, standard deviation and number of seeds of a line, by sparsity."""
    values: dict[float, list[float]] = {}
    for point in found:
        if (point.line, point.metric) == (line, metric):
            values.setdefault(point.sparsity, []).append(point.value)
    return {s: summary(v) for s, v in sorted(values.items())}


def summary(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, standard deviation (0 for one value) and count."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), deviation, len(values)
