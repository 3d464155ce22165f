"""What `prune` returns."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

from ..patterns import Pattern
from .left import LeftWeight, all_reasons, find_left

AS_THEY_ARE = "weights as they are"


@dataclass(frozen=True)
class PrunedLayer:
    """One pruned weight. `zeros` counts weights that are exactly 0, `total` all of them.

    `note` says what did not go as usual (data that did not reach the layer), empty otherwise.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    zeros: int
    total: int
    aliases: tuple[str, ...] = ()
    note: str = ""

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.total if self.total else 0.0


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did: the pruned layers in module order, and what was left as it is.

    Attributes:
        method: Name of the method.
        pattern: The pattern.
        scope: The scope.
        layers: The pruned layers.
        skipped: Why others were left, by name of the layer (of the parameter, where that is not
            called `weight`).
        left: Every parameter of two dimensions or more outside of `layers`, with its size.
    """

    method: str
    pattern: str
    scope: str
    layers: tuple[PrunedLayer, ...]
    skipped: dict[str, str]
    left: tuple[LeftWeight, ...] = ()

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
        return self.zeros / self.total if self.total else 0.0

    @property
    def model_zeros(self) -> int:
        """Zeros in the pruned layers and in the weights left."""
        return self.zeros + sum(row.zeros for row in self.left)

    @property
    def model_total(self) -> int:
        """Weights in the whole model: all parameters of two dimensions or more, each once."""
        return self.total + sum(row.total for row in self.left)

    @property
    def model_sparsity(self) -> float:
        """Share of zeros over the whole model; biases and normalisations do not count."""
        return self.model_zeros / self.model_total if self.model_total else 0.0

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
                "note": layer.note,
            }
            for layer in self.layers
        ]
        head = {"method": self.method, "pattern": self.pattern, "scope": self.scope}
        sums = {"zeros": self.zeros, "total": self.total, "sparsity": self.sparsity}
        whole = {
            "zeros": self.model_zeros,
            "total": self.model_total,
            "sparsity": self.model_sparsity,
        }
        left = [row.to_dict() for row in self.left]
        rest = {"layers": layers, "skipped": dict(self.skipped), "left": left, "model": whole}
        return {**head, **sums, **rest}

    def table(self) -> str:
        """Draw the report as a text table."""
        from rich.console import Console
        from rich.markup import escape
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
            table.add_row(escape(name), shape, *counts)
        text = io.StringIO()
        console = Console(file=text, width=120, color_system=None)
        console.print(table)
        if self.left or self.skipped:
            console.print(self._left_table())
        console.print(self._summary(), soft_wrap=True, markup=False, highlight=False)
        return text.getvalue()

    def _left_table(self):
        from rich.markup import escape
        from rich.table import Table

        table = Table(title="left as it is", title_justify="left")
        for name in ("weight", "shape", "weights", "of model", "why"):
            side = "right" if name in ("weights", "of model") else "left"
            table.add_column(name, justify=side, overflow="fold")
        for row in self.left:
            shape, share = " x ".join(map(str, row.shape)), row.total / max(1, self.model_total)
            cells = f"{row.total:,}", f"{share:.2%}", row.reason
            table.add_row(escape(row.name or "(model)"), shape, *cells)
        listed = {row.name for row in self.left}
        for name, reason in self.skipped.items():
            inside = any(n.startswith(f"{name}.") or not name for n in listed)
            if name not in listed and not inside:
                table.add_row(escape(name or "(model)"), "", "", "", reason)
        return table

    def _summary(self) -> str:
        lines = [f"{layer.name or '(model)'}: {layer.note}" for layer in self.layers if layer.note]
        done = "pruned layers" if self.method != AS_THEY_ARE else "layers above"
        lines.append(f"{done}: {self.sparsity:.2%} of {self.total:,} weights are zero")
        lines.append(
            f"whole model: {self.model_sparsity:.2%} of {self.model_total:,} weights are zero "
            "(all parameters of two dimensions or more)"
        )
        rest = self.model_total - self.total
        if rest:
            share = rest / self.model_total
            lines.append(
                f"{rest:,} weights ({share:.2%} of the model) were left as they are, "
                f"in {len(self.left)} parameters"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        """Give the table."""
        return self.table()


def make_report(
    method: str, pattern: Pattern, scope, layers, skipped, model, notes: Mapping | None = None
) -> PruneReport:
    """Count the zeros that are in the weights of `model` now; `notes` go by layer name."""
    rows = []
    for layer in layers:
        weight = layer.weight
        zeros = weight.numel() - int(weight.count_nonzero())
        shape = tuple(weight.shape)
        note = "; ".join(filter(None, (layer.note, (notes or {}).get(layer.name))))
        counts = zeros, weight.numel(), layer.aliases, note
        rows.append(PrunedLayer(layer.name, shape, str(pattern), *counts))
    name = "dict" if isinstance(scope, Mapping) else scope
    left = find_left(model, layers, skipped)
    reasons = all_reasons(skipped, left)
    return PruneReport(method, str(pattern), name, tuple(rows), reasons, left)
