"""A progress bar for what takes a while."""

import sys
from collections.abc import Iterable, Sequence

MANY = 8  # more items than this are worth a bar that nobody asked for


def track(items: Sequence, what: str, show: bool | None = None) -> Iterable:
    """Pass items on one by one, with a progress bar on stderr.

    Args:
        items: A sequence.
        what: Text before the bar.
        show: Whether to show it; None: in a terminal, when there are many items.
    """
    if show is None:
        show = len(items) > MANY and sys.stderr.isatty()
    if not show:
        return items
    from rich.console import Console
    from rich.progress import track as bar

    # Where nothing can be taken back, as in a log file, one line stays.
    return bar(items, what, console=Console(stderr=True), transient=sys.stderr.isatty())
