"""What `prune` returns."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

from ..patterns import Pattern


@dataclass(frozen=True)
class PrunedLayer:
    """One pruned weight. `zeros` counts weights that are exactly 0, `total` all of them."""

    name: str
    shape: tuple[int, ...]
    pattern: str
    zeros: int
    total: int
    aliases: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.total


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did: the pruned layers in module order, and why others were left out."""

    method: str
    pattern: str
    scope: str
    layers: tuple[PrunedLayer, ...]
    skipped: dict[str, str]

    @property
    def zeros(self) -> int:
        """Zeros in all pruned layers."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def total(self) -> int:
        """Weights in all pruned layers; biases and skipped layers do not count."""
        return sum(layer.total for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned layers."""
        return self.zeros / self.total

    def to_dict(self) -> dict:
        """Give the report as plain dicts, lists, strings and numbers (ready for JSON)."""
        layers = [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "pattern": layer.pattern,
                "zeros": layer.zeros,
                "total": layer.total,
                "sparsity": layer.sparsity,
                "aliases": list(layer.aliases),
            }
            for layer in self.layers
        ]
        head = {"method": self.method, "pattern": self.pattern, "scope": self.scope}
        sums = {"zeros": self.zeros, "total": self.total, "sparsity": self.sparsity}
        return {**head, **sums, "layers": layers, "skipped": dict(self.skipped)}

    def table(self) -> str:
        """Draw the report as a text table."""
        from rich.console import Console
        from rich.table import Table

        title = f"{self.method}, {self.pattern}, {self.scope}"
        table = Table(title=title, show_footer=True, title_justify="left")
        table.add_column("layer", "total")
        table.add_column("shape")
        table.add_column("zeros", f"{self.zeros:,}", justify="right")
        table.add_column("weights", f"{self.total:,}", justify="right")
        table.add_column("sparsity", f"{self.sparsity:.2%}", justify="right")
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            counts = f"{layer.zeros:,}", f"{layer.total:,}", f"{layer.sparsity:.2%}"
            name = " = ".join([layer.name or "(model)", *layer.aliases])
            table.add_row(name, shape, *counts)
        for name, reason in self.skipped.items():
            table.add_row(name or "(model)", f"left out: {reason}")
        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(table)
        return text.getvalue()

    def __str__(self) -> str:
        """Give the table."""
        return self.table()


def make_report(method: str, pattern: Pattern, scope, layers, skipped) -> PruneReport:
    """Count the zeros that are in the weights now."""
    rows = []
    for layer in layers:
        weight = layer.weight
        zeros = weight.numel() - int(weight.count_nonzero())
        shape = tuple(weight.shape)
        row = PrunedLayer(layer.name, shape, str(pattern), zeros, weight.numel(), layer.aliases)
        rows.append(row)
    name = "dict" if isinstance(scope, Mapping) else scope
    return PruneReport(method, str(pattern), name, tuple(rows), skipped)
