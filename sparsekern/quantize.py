"""quantize: sparse linear layers with values of 8 bits, for inference."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from .measure.structure import check_inputs, forward_call
from .nn import SparseConv2d, SparseLinear
from .sites import Site, find_sparse
from .weight_base import SparseWeight
from .weight_checks import dynamic_obstacle
from .weights_int8 import DYNAMIC, QUANTIZED, Int8BlockWeight, Int8NMWeight

ACTIVATIONS = ("float", "dynamic")


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer.

    Attributes:
        name: Name in the model, empty for the model itself.
        shape: Shape of the dense weight.
        format: The format it has now.
        bytes_before, bytes_after: Of values and scales.
        error: Norm of the change of the output (before the activation) over its norm, on what the
            layer gets in a run of the quantized model; None without inputs, or when not called.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bytes_before: int
    bytes_after: int
    error: float | None


@dataclass
class QuantizationReport:
    """The result of `quantize`.

    Attributes:
        layers: One row per layer that was quantized.
        skipped: Name and reason of every sparse layer that was not.
        weight_only: Name and reason of every layer whose activations stay float against the wish.
        dtype: Of the values, `int8` or `float8_e4m3fn`.
        notes: What costs time where the model is.
    """

    layers: list[QuantizedLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    weight_only: dict[str, str] = field(default_factory=dict)
    dtype: str = "int8"
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """All layers as a table."""
        from .measure.table import text_table

        cells = [
            [
                row.name or "(the model)", "x".join(map(str, row.shape)), row.format,
                f"{row.bytes_before / 1e6:.3f}", f"{row.bytes_after / 1e6:.3f}",
                "-" if row.error is None else f"{row.error:.2%}",
            ]
            for row in self.layers
        ]  # fmt: skip
        columns = ["layer", "weight", "format", "MB before", "MB after", "output error"]
        text = text_table(f"quantize, {self.dtype}", columns, cells)
        notes = [f"{n}: {r}" for n, r in self.skipped.items()]
        notes += [f"{n or '(the model)'}: weight only, {r}" for n, r in self.weight_only.items()]
        return "\n".join([text.rstrip("\n"), *notes, *self.notes])

    def __str__(self) -> str:
        return self.table()


def quantize(
    model: nn.Module, example_inputs=None, dtype=torch.int8, activations: str = "float"
) -> QuantizationReport:
    """Store the values of all sparse linear layers in 8 bits, one scale per output; for inference.

    A value then takes one byte instead of four. With `activations="float"` products stay float32
    and activations as they are. With "dynamic" every call of a layer of format block or nm
    quantizes its input as well, one scale per token (largest absolute value / 127, or / 448 in
    float8). Blocks then multiply int8 with int8 into int32 on the CPU, faster where it has VNNI; a
    token with a NaN or an infinity gives NaN in all outputs. For nm a GPU's tensor cores multiply
    8-bit numbers, twice as many a second, through cuSPARSELt, and a product comes out in bfloat16
    before it is scaled. The error of a layer in the report counts both roundings. Layers that
    cannot (csr, blocks whose columns are no multiple of 4) keep float activations, and the report
    says so.

    On the CPU no kernel reads 8-bit N:M values: they are turned into float32 on every call, which
    costs time and saves memory only; the report says that, too.

    Convolutions and dense layers are left. Files, state_dict and copies work as before. The weights
    are frozen: a layer in training mode raises, in eval mode gradients reach inputs and biases.

    Args:
        model: A model with sparse layers (`sk.convert_to_sparse`), or such a layer; changed in
            place. Layers that share a weight go on sharing it.
        example_inputs: As in `convert_to_sparse`; one run then measures the error of each layer.
        dtype: torch.int8, or torch.float8_e4m3fn for layers of format nm (a GPU multiplies it from
            compute capability 8.9 on).
        activations: "float" or "dynamic".

    Returns:
        Bytes and errors per layer.

    Raises:
        TypeError: example_inputs of another kind.
        ValueError: another dtype or kind of activations, no sparse linear layer with float values
            that the dtype can store, or a weight that is not finite. The model is then unchanged.
    """
    if dtype not in QUANTIZED:
        wanted = " or ".join(map(str, QUANTIZED))
        raise ValueError(f"quantize: expected dtype {wanted}, got {dtype}")
    if activations not in ACTIVATIONS:
        wanted = " or ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"quantize: expected activations to be {wanted}, got {activations!r}")
    if example_inputs is not None:
        check_inputs(example_inputs, "quantize")
    sites, skipped = _choose(model, dtype)
    before = {site.name: site.module.weight for site in sites}
    kinds = {name: QUANTIZED[dtype][type(weight)] for name, weight in before.items()}
    weight_only = _weight_only(before, kinds) if activations == "dynamic" else {}
    if activations == "dynamic":
        kinds = {n: kind if n in weight_only else DYNAMIC[kind] for n, kind in kinds.items()}
    fresh = {id(w): kinds[name].from_weight(w) for name, w in before.items()}
    for site in sites:
        site.module.weight = fresh[id(before[site.name])].train(site.module.training)
    errors = _errors(model, sites, before, example_inputs)
    rows = [_row(site, before[site.name], errors.get(site.name)) for site in sites]
    return QuantizationReport(rows, skipped, weight_only, _name(dtype), _notes(sites))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _notes(sites: list[Site]) -> list[str]:
    """What the 8 bits cost where the model is."""
    weights = [site.module.weight for site in sites]
    if not any(isinstance(w, Int8NMWeight) and w.device.type == "cpu" for w in weights):
        return []
    return [
        "layers of format nm get slower on the CPU: no kernel reads their 8-bit values, which are "
        "turned into float32 on every call; memory is what is saved"
    ]


def _choose(model: nn.Module, dtype: torch.dtype) -> tuple[list[Site], dict[str, str]]:
    """The layers to quantize, and why the other sparse ones are not; ValueError without any."""
    found = find_sparse(model)
    reasons = {site.name: _obstacle(site.module, dtype) for site in found}
    sites = [site for site in found if not reasons[site.name]]
    skipped = {name: reason for name, reason in reasons.items() if reason}
    if not sites:
        got = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "none"
        raise ValueError(f"quantize: expected a model with sparse linear layers, got {got}")
    return sites, skipped


def _weight_only(weights: dict[str, SparseWeight], kinds: dict[str, type]) -> dict[str, str]:
    """Why a layer cannot have activations of 8 bits, for those that cannot."""
    reasons = {name: _float_activations(weights[name], kind) for name, kind in kinds.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _float_activations(weight: SparseWeight, kind: type) -> str:
    if kind not in DYNAMIC:
        return f"no products of int8 for format {weight.format}"
    if kind is Int8BlockWeight:
        return dynamic_obstacle(weight.values.shape[2], weight.shape[1])
    return ""


def _row(site: Site, old: SparseWeight, error: float | None) -> QuantizedLayer:
    new = site.module.weight
    sizes = old.values.nbytes, new.values.nbytes + new.scales.nbytes
    return QuantizedLayer(site.name, tuple(new.shape), new.format, *sizes, error)


def _obstacle(layer: nn.Module, dtype: torch.dtype) -> str:
    name, weight = _name(dtype).removesuffix("_e4m3fn"), layer.weight
    if isinstance(layer, SparseConv2d):
        return "convolutions keep their dtype"
    if not weight.values.is_floating_point():
        stored = "int8" if weight.values.dtype == torch.int8 else "float8"
        return f"its values are {stored} already"
    # float16 layers run on a GPU alone, where only the N:M op has a kernel.
    known = (torch.float32, torch.bfloat16, *((torch.float16,) if weight.format == "nm" else ()))
    if weight.dtype not in known:
        return f"no {name} kernel for inputs of {weight.dtype}"
    if type(weight) not in QUANTIZED[dtype]:
        return f"no {name} kernel for format {weight.format}"
    return "its weight is on the meta device" if weight.values.is_meta else ""


def _errors(model, sites, before, inputs) -> dict[str, float]:
    """Relative output error of each layer in one run of the quantized model, in eval mode."""
    if inputs is None:
        return {}
    squares = {site.name: [0.0, 0.0] for site in sites}

    def hook(site):
        def compare(layer: SparseLinear, arguments, output):
            x, bias = arguments[0].float(), layer.bias
            bias = None if bias is None else bias.float()
            exact = nn.functional.linear(x, before[site.name].to_dense().float(), bias)
            got = layer.weight.linear(x, bias, "none")
            squares[site.name][0] += float((got - exact).double().square().sum())
            squares[site.name][1] += float(exact.double().square().sum())

        return compare

    modes = {module: module.training for module in model.modules()}
    handles = [site.module.register_forward_hook(hook(site)) for site in sites]
    try:
        with torch.inference_mode():
            forward_call(model.eval(), inputs)()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return {name: (e / y) ** 0.5 for name, (e, y) in squares.items() if y > 0}
