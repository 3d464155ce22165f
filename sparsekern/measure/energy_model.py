"""A modelled estimate of energy: operations and bytes moved, times published energies.

It is an estimate of a fictional 45 nm chip, not of the machine at hand; it serves to compare a
dense with a sparse model where no counter exists, and it is always labelled `modelled`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from sparsekern.measure.energy import EnergyReading
from sparsekern.measure.structure import check_inputs, evaluating, forward_call

# Picojoules per operation: M. Horowitz, "Computing's energy problem (and what we can do about
# it)", ISSCC 2014, figure 1.1.9, 45 nm at 0.9 V.
PICOJOULES = {
    "int8 add": 0.03,
    "int32 add": 0.1,
    "fp16 add": 0.4,
    "fp32 add": 0.9,
    "int8 mult": 0.2,
    "fp16 mult": 1.1,
    "fp32 mult": 3.7,
}
# Picojoules per 64-bit access, same figure; for DRAM the lower end of the printed 1.3 to 2.6 nJ.
PICOJOULES_PER_64_BIT = {"8KB": 10.0, "32KB": 20.0, "1MB": 100.0, "DRAM": 1300.0}

# (multiply, add) of one multiply-accumulate. 16-bit products are summed in 32 bits, as torch's
# and our kernels do; bfloat16 is charged as fp16, since the figure has no entry for it.
MAC_OPERATIONS = {
    torch.float32: ("fp32 mult", "fp32 add"),
    torch.float16: ("fp16 mult", "fp32 add"),
    torch.bfloat16: ("fp16 mult", "fp32 add"),
    torch.int8: ("int8 mult", "int32 add"),
}

SPARSE_LAYERS = {"SparseLinear", "SparseConv2d"}


@dataclass(frozen=True)
class LayerCount:
    """Work of one layer in one forward pass, all calls of it together.

    Attributes:
        name: the module's name in the model.
        dtype: dtype of the products; of the weight, but float32 where only that is int8.
        macs: multiply-accumulates; for a sparse layer only those of stored values.
        index_reads: indices read, one integer addition each; 0 for a dense layer.
        weight_bytes: bytes of values, their scales if they are int8, and bias.
        index_bytes: bytes of indices.
        activation_bytes: bytes of the input read and the output written.
    """

    name: str
    dtype: torch.dtype
    macs: int
    index_reads: int
    weight_bytes: int
    index_bytes: int
    activation_bytes: int

    @property
    def bytes_moved(self) -> int:
        """Bytes of weights, indices and activations together."""
        return self.weight_bytes + self.index_bytes + self.activation_bytes


@dataclass(frozen=True)
class OperationCount:
    """Work of one forward pass.

    Attributes:
        layers: one entry per call of a counted layer, in order.
        uncounted: module types with parameters of their own that were charged nothing, and how
            many of each (also counted types whose forward never ran).
    """

    layers: tuple[LayerCount, ...]
    uncounted: dict[str, int]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers."""
        return sum(layer.macs for layer in self.layers)

    @property
    def bytes_moved(self) -> int:
        """Bytes moved by all layers."""
        return sum(layer.bytes_moved for layer in self.layers)


def count_operations(model: nn.Module, example_inputs) -> OperationCount:
    """Count the work of Linear, Conv2d, transformers' Conv1D and sparse layers in a real run.

    Every other layer, attention products and elementwise operations are counted as zero and
    named in `uncounted` if they own parameters. Zeros in a dense weight are counted as work,
    because dense kernels do not skip them; padding of a convolution likewise.

    Args:
        model: the model, run once in evaluation mode.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        TypeError, ValueError: if `example_inputs` is none of these or holds no tensor.
    """
    check_inputs(example_inputs, "count_operations")
    layers: list[LayerCount] = []
    seen: set[nn.Module] = set()

    def record(name: str):
        def hook(module, args, kwargs, output) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            layers.append(_count_layer(name, module, given, output))
            seen.add(module)

        return hook

    handles = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in model.named_modules()
        if _is_counted(module)
    ]
    try:
        with evaluating(model):
            forward_call(model, example_inputs)()
    finally:
        for handle in handles:
            handle.remove()
    return OperationCount(tuple(layers), _uncounted(model, seen))


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _is_counted(module: nn.Module) -> bool:
    # Sparse layers and transformers' Conv1D go by class name, so that counting imports neither.
    known = isinstance(module, (nn.Linear, nn.Conv2d))
    return known or bool(_class_names(module) & (SPARSE_LAYERS | {"Conv1D"}))


def _count_layer(name: str, module: nn.Module, given, output) -> LayerCount:
    sparse = bool(_class_names(module) & SPARSE_LAYERS)
    values = module.weight.values if sparse else module.weight
    scales = getattr(module.weight, "scales", None)  # of int8 values
    indices = module.weight.indices() if sparse else ()
    bias = getattr(module, "bias", None)
    positions = output.numel() // max(_outputs(module), 1)
    return LayerCount(
        name=name,
        dtype=module.weight.product_dtype if sparse else values.dtype,
        macs=positions * values.numel(),
        index_reads=sum(i.numel() for i in indices),
        weight_bytes=sum(_bytes(t) for t in (values, scales, bias) if t is not None),
        index_bytes=sum(_bytes(i) for i in indices),
        activation_bytes=_bytes(given) + _bytes(output),
    )


def _outputs(module: nn.Module) -> int:
    """Output features or channels: output elements per token or per pixel."""
    if "Conv1D" in _class_names(module):  # transformers stores its weight as (in, out)
        return module.weight.shape[1]
    return module.weight.shape[0]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _uncounted(model: nn.Module, seen: set[nn.Module]) -> dict[str, int]:
    inside = {sub for module in seen for sub in module.modules()}
    rest = (m for m in model.modules() if m not in inside)
    owners = (m for m in rest if next(m.parameters(recurse=False), None) is not None)
    return dict(Counter(type(m).__name__ for m in owners))


def modelled_energy(count: OperationCount, memory: str = "DRAM") -> EnergyReading:
    """Energy of one forward pass by the formula `formula_text` prints.

    Args:
        count: work of the pass.
        memory: where weights, indices and activations come from: "8KB", "32KB", "1MB" or "DRAM".

    Returns:
        A reading with source "modelled" and its parts in joules (arithmetic, index, memory); one
        without joules if a layer's dtype has no published energy.

    Raises:
        ValueError: for an unknown `memory`.
    """
    if memory not in PICOJOULES_PER_64_BIT:
        raise ValueError(
            f"modelled_energy: expected memory to be one of {list(PICOJOULES_PER_64_BIT)}, "
            f"got {memory!r}"
        )
    arithmetic = index = moved = 0.0
    for layer in count.layers:
        if layer.dtype not in MAC_OPERATIONS:
            return EnergyReading.missing(f"no published energy per operation for {layer.dtype}")
        mult, add = MAC_OPERATIONS[layer.dtype]
        arithmetic += layer.macs * (PICOJOULES[mult] + PICOJOULES[add])
        index += layer.index_reads * PICOJOULES["int32 add"]
        moved += layer.bytes_moved * PICOJOULES_PER_64_BIT[memory] / 8
    parts = {"arithmetic": arithmetic * 1e-12, "index": index * 1e-12, "memory": moved * 1e-12}
    return EnergyReading(
        joules=sum(parts.values()),
        source="modelled",
        reason=f"operations and bytes from {memory} times energies of Horowitz 2014, 45 nm",
        parts=parts,
    )


def formula_text(memory: str = "DRAM") -> str:
    """The formula, the table of energies and the assumptions of `modelled_energy`, as text."""
    operations = ", ".join(f"{name} {pj:g} pJ" for name, pj in PICOJOULES.items())
    accesses = ", ".join(f"{name} {pj:g} pJ" for name, pj in PICOJOULES_PER_64_BIT.items())
    return (
        "Modelled energy = MACs x (multiply + add) + indices read x int32 add "
        f"+ bytes moved x energy per byte of {memory}. "
        f"Energies (Horowitz, ISSCC 2014, 45 nm, 0.9 V): {operations}; "
        f"per 64-bit access: {accesses} (DRAM: lower end of 1.3 to 2.6 nJ). "
        "Assumptions: a sparse layer does one MAC per stored value and token, and reads each "
        "index once per call with one integer addition; values, indices, bias, input and output "
        f"of each layer cross {memory} once per call; accesses to registers and caches beyond "
        "that, instruction overheads and leakage cost nothing; products of 16-bit floats are "
        "summed in 32 bits and bfloat16 is charged as fp16. Only linear and 2-d convolution "
        "layers are counted. It is an estimate for comparing two models, not a measurement of "
        "this machine."
    )
