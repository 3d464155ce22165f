"""What a conversion did: one row per layer, and the whole model's times."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace

from torch import nn

from .sites import LeftOut, find_sparse

REPORT = "_sparsekern_report"
SHOWN = 8  # names of a kind in the printed report; `to_dict` has all
IN_WORDS = {
    "inference_mode": " under inference_mode",
    "no_grad": " under no_grad",
    "gradients": " with gradients on",
}


def gain_text(gain: float, way: str = "") -> str:
    """A gain and the way of calling it holds for; cut, not rounded: 1.05x is no less than that."""
    return f"{math.floor(gain * 100 + 1e-6) / 100:.2f}x{IN_WORDS.get(way, '')}"


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: Name in the model, empty for the model itself.
        kind: `Linear`, `Conv2d` or `Conv1D`.
        shape: Shape of the dense weight.
        pattern: Pattern of the zeros, empty where it was not looked for.
        sparsity: Share of zeros, None where the weight is computed anew by each call.
        format: `csr`, `block` or `nm` when sparse (with `_int8`, `_float8` and `_dynamic` behind it
            once quantized), `dense` when left dense.
        dense_ms: Time of the dense layer at the shapes seen, all its calls in one run of the model,
            in the way of calling that decided; None when not timed.
        sparse_ms: The same for the sparse layer.
        max_error: Largest absolute difference of the outputs, None when not compared.
        reason: Why this format.
        activation: The activation fused into the sparse layer, or `none`.
        way: The way of calling that decided, as sparse gains least in it: `inference_mode`,
            `no_grad` or `gradients` (a plain call); `training`, or empty when not timed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str
    sparsity: float | None
    format: str
    dense_ms: float | None
    sparse_ms: float | None
    max_error: float | None
    reason: str
    activation: str = "none"
    way: str = ""


@dataclass
class ConversionReport:
    """The result of `convert_to_sparse`.

    Attributes:
        layers: One row per linear or convolution layer.
        mode: `inference` or `training`.
        model_dense_ms: Median time of the whole model before, in the way of calling that decided;
            None when not timed.
        model_sparse_ms: Median time after.
        model_folded_ms: Median time of the dense model with its normalisations folded, None when
            none were.
        model_gain: What decided: how many times faster than the faster dense model, the median of
            neighbouring samples. It may differ a little from the ratio of the medians.
        model_way: The way of calling in which that is least, as in `LayerReport`.
        model_gains: The gain in each way of calling that was timed.
        folded: Names of the normalisations folded into the layer before them.
        fused: Names of the activations that sparse layers compute now.
        pools: Names of the max pools that run by way of channels_last.
        residuals: Names of the blocks whose residual sums convolutions add.
        pads: Names of the blocks whose images are padded by the convolutions that read them.
        part_images: How many images of a batch run at a time, None where whole batches do.
        part_gain: How many times faster that is than whole batches.
        norms: Names of the batch normalisations that train by an op of ours.
        fusion_error: Largest difference that folding, fusing and sparse layers together make to the
            outputs of the whole model, relative to the largest output. None when nothing was folded
            or fused, or the outputs hold no tensor.
        reverted: Whether the model went back to dense because it was not faster as a whole.
        left_out: Weights of two dimensions and more that are none of linear or convolution layers.
        notes: Anything else to know.
    """

    layers: list[LayerReport] = field(default_factory=list)
    mode: str = "inference"
    model_dense_ms: float | None = None
    model_sparse_ms: float | None = None
    model_folded_ms: float | None = None
    model_gain: float | None = None
    model_way: str = ""
    model_gains: dict[str, float] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    pools: list[str] = field(default_factory=list)
    residuals: list[str] = field(default_factory=list)
    pads: list[str] = field(default_factory=list)
    part_images: int | None = None
    part_gain: float | None = None
    norms: list[str] = field(default_factory=list)
    fusion_error: float | None = None
    reverted: bool = False
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_block(self, name: str, sums: int, pads: int) -> None:
        """A block that runs by a rewritten forward."""
        if sums:
            self.residuals.append(name)
        if pads:
            self.pads.append(name)

    @property
    def n_sparse(self) -> int:
        """Number of layers that are sparse now."""
        return sum(layer.format != "dense" for layer in self.layers)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """One line."""
        text = f"{self.n_sparse} of {len(self.layers)} layers sparse"
        if self.model_dense_ms and self.model_sparse_ms:
            text += f"; whole model {self.model_dense_ms:.2f} ms dense, "
            if self.model_folded_ms:
                text += f"{self.model_folded_ms:.2f} ms dense and folded, "
            text += f"{self.model_sparse_ms:.2f} ms sparse"
            if self.model_gain:
                text += f" ({gain_text(self.model_gain, self.model_way)})"
        return text + ("; reverted to dense" if self.reverted else "")

    def table(self) -> str:
        """All layers as a table, with the summary and the notes below."""
        from .measure.table import text_table

        columns = ["layer", "weight", "pattern", "sparsity", "format"]
        columns += ["dense ms", "sparse ms", "speed-up", "why"]
        text = text_table(
            f"convert_to_sparse, {self.mode}", columns, [_cells(row) for row in self.layers]
        )
        return "\n".join([text.rstrip("\n"), self.summary(), *self._lines(), *self.notes])

    def _lines(self) -> list[str]:
        lines = self._fusion()
        if self.left_out:
            names = [f"{w.name} ({w.kind} {_size(w.shape)}: {w.reason})" for w in self.left_out]
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            total = sum(math.prod(w.shape) for w in self.left_out)
            lines.append(
                f"{len(names)} weights not looked at, {total:,} numbers: "
                f"{', '.join(names[:SHOWN])}{more}"
            )
        return lines

    def _fusion(self) -> list[str]:
        lines = []
        if self.folded:
            lines.append(f"{len(self.folded)} normalisations folded: {', '.join(self.folded)}")
        if self.fused:
            lines.append(f"{len(self.fused)} activations fused: {', '.join(self.fused)}")
        if self.pools:
            lines.append(f"{len(self.pools)} max pools in channels_last: {', '.join(self.pools)}")
        if self.residuals:
            blocks = ", ".join(self.residuals)
            lines.append(f"{len(self.residuals)} blocks add residuals in convolutions: {blocks}")
        if self.pads:
            lines.append(f"{len(self.pads)} blocks pad in convolutions: {', '.join(self.pads)}")
        if self.part_images:
            text = f"batches of images run in parts of {self.part_images}"
            lines.append(f"{text}: {self.part_gain:.2f}x faster than whole")
        if self.norms:
            lines.append(f"{len(self.norms)} normalisations by our op: {', '.join(self.norms)}")
        if lines and self.fusion_error is not None:
            lines.append(f"outputs of the whole model within {self.fusion_error:.1e} of before")
        return lines

    def __str__(self) -> str:
        return self.table()


def report(model: nn.Module) -> ConversionReport:
    """What `convert_to_sparse` did to this model, layer by layer.

    A model that was not converted (built from sparse layers, say) gets a report without times.
    """
    found = getattr(model, REPORT, None)
    if found is not None:
        found.layers = _quantized_since(model, found.layers)
        return found
    rows = [
        LayerReport(
            site.name, site.kind, tuple(site.module.weight.shape), site.module.pattern,
            site.module.sparsity, site.module.weight.format, None, None, None,
            "sparse layer, not timed",
            site.module.activation,
        )
        for site in find_sparse(model)
    ]  # fmt: skip
    return ConversionReport(layers=rows)


def _quantized_since(model: nn.Module, rows: list[LayerReport]) -> list[LayerReport]:
    """The rows with the format that their layers have now: `quantize` may have changed it."""
    formats = {site.name: site.module.weight.format for site in find_sparse(model)}

    def current(row: LayerReport) -> LayerReport:
        now = formats.get(row.name, row.format)
        kind = next((k for k in ("int8", "float8") if f"_{k}" in now), "")
        if now == row.format or not kind:
            return row
        note = f"; {kind} since, the times are those of float values"
        return replace(row, format=now, reason=row.reason + note)

    return [current(row) for row in rows]


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)


def _cells(row: LayerReport) -> list[str]:
    def ms(value):
        return "-" if value is None else f"{value:.3f}"

    ratio = gain_text(row.dense_ms / row.sparse_ms) if row.dense_ms and row.sparse_ms else "-"
    shape = _size(row.shape)
    zeros = "-" if row.sparsity is None else f"{row.sparsity:.1%}"
    layout = row.format if row.activation == "none" else f"{row.format} + {row.activation}"
    return [
        row.name or "(the model)", f"{row.kind} {shape}", row.pattern or "-", zeros,
        layout, ms(row.dense_ms), ms(row.sparse_ms), ratio, row.reason,
    ]  # fmt: skip
