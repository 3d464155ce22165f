"""Layers that may become sparse: their twins hung in and out, the whole model timed both ways."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.utils._pytree import tree_leaves

from .chain import Slot
from .conversion import LayerReport
from .fuse import FusedActivation
from .measure.graphs import capture
from .measure.structure import forward_call
from .measure.timer import interleaved, speedup
from .patterns import Unstructured, detect
from .sites import Site, find_sites, group_tied, what_is_there
from .tune import WAYS, InputSpec, called


@dataclass
class Candidate:
    """A group of layers with one weight, its sparse twins and what was measured.

    `mask` says what to store where the zeros do not; None elsewhere. The times are those of the way
    of calling in which sparse gains least, `way`.
    """

    sites: list[Site]
    sparsity: float | None = None
    pattern: str = ""
    mask: Tensor | None = None
    format: str = "csr"
    sparse: list[nn.Module] = field(default_factory=list)
    fused: list[tuple[Slot, FusedActivation]] = field(default_factory=list)
    dense_ms: float | None = None
    sparse_ms: float | None = None
    way: str = ""
    error: float | None = None
    take: bool = False
    reason: str = ""

    @property
    def gain(self) -> float:
        """How many times faster sparse is, once timed."""
        return self.dense_ms / self.sparse_ms

    def count_zeros(self, training: bool) -> None:
        """Set `mask` and `sparsity`; None where the weight is computed anew by each call.

        A Pruner's mask counts where it tells more than the zeros: what to train, or a pattern.
        """
        first = self.sites[0]
        state = first.module.__dict__
        weight = first.module._parameters.get("weight", state.get("weight"))  # or of torch's prune
        unknown = not isinstance(weight, Tensor) or isinstance(weight, UninitializedTensorMixin)
        if unknown or weight.is_meta:
            return
        masks = (site.mask for site in self.sites)
        mask = next((found for found in masks if found is not None), None)
        if mask is not None and (training or detect(mask) != Unstructured()):
            self.mask = mask
        kept = first.weight != 0 if self.mask is None else self.mask
        self.sparsity = float((~kept).float().mean()) if kept.numel() else 0


def find_candidates(model, mode: str, min_gain: float) -> list[Candidate]:
    """The layers of a model in groups; ValueError for what `convert_to_sparse` refuses."""

    def refuse(wanted, got):
        raise ValueError(f"convert_to_sparse: expected {wanted}, got {got}")

    if not isinstance(model, nn.Module):
        refuse("model to be a torch.nn.Module", type(model).__name__)
    if mode not in ("inference", "training"):
        refuse("mode to be 'inference' or 'training'", repr(mode))
    if not isinstance(min_gain, (int, float)) or not min_gain > 0:
        refuse("min_gain > 0", repr(min_gain))
    sites = find_sites(model)
    if not sites:
        refuse("a model with dense linear or convolution layers", what_is_there(model))
    devices = {str(s.module.weight.device) for s in sites if isinstance(s.module.weight, Tensor)}
    if len(devices) > 1:
        refuse("all layers on one device", ", ".join(sorted(devices)))
    for site in sites:
        if not site.obstacle and not bool(torch.isfinite(site.weight).all()):
            refuse("finite weights", f"NaN or Inf in layer {site.name or '(the model)'!r}")
    return [Candidate(group) for group in group_tied(sites)]


def swap(model: nn.Module, taken: list[Candidate]) -> nn.Module:
    """Hang the sparse layers in; returns the model, or the layer that replaces it."""
    result = model
    for candidate in taken:
        for site, sparse in zip(candidate.sites, candidate.sparse, strict=True):
            site.put(sparse)
            result = sparse if site.module is model else result
        for slot, stand_in in candidate.fused:
            slot.put(stand_in)
    return result


def swap_back(model: nn.Module, taken: list[Candidate]) -> nn.Module:
    """Hang the dense layers and their activations back; returns the model."""
    for candidate in taken:
        for site in candidate.sites:
            site.put(site.module)
        for slot, _ in candidate.fused:
            slot.put(slot.module)
    return model


@contextmanager
def eval_mode(*modules: nn.Module):
    """Dropout and batch statistics off; training flags are restored."""
    flags = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


def record_inputs(model: nn.Module, inputs, modules: set[nn.Module]) -> dict[int, Counter]:
    """How often each of some modules saw which input in a run of the model, by id of the module."""
    specs: dict[int, Counter] = {}

    def remember(module, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        specs.setdefault(id(module), Counter())[InputSpec.of(x)] += 1

    hooks = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in modules]
    try:
        with eval_mode(model), torch.inference_mode():
            forward_call(model, inputs)()
    finally:
        for hook in hooks:
            hook.remove()
    return specs


def settle_list(model: nn.Module, inputs):
    """Example inputs that came as a list: positional arguments, or one argument that is a list.

    Raises:
        ValueError: the model takes the list in neither way.
    """
    if not isinstance(inputs, list):
        return inputs
    if runs(model, inputs, "no_grad"):
        return inputs
    if runs(model, (inputs,), "no_grad"):
        return (inputs,)
    try:
        with eval_mode(model), torch.no_grad():
            run_model(model, inputs)
    except Exception as error:
        raise ValueError(
            "convert_to_sparse: expected example_inputs to be one batch: a tensor, a tuple of "
            "positional or a dict of keyword arguments, got a list of "
            f"{len(inputs)}, which the model takes neither as its arguments nor as one argument "
            f"({type(error).__name__}: {error}); of a list of batches, pass one"
        ) from error
    return inputs


def check_graphs(device: torch.device, mode: str, inputs) -> None:
    """Refuse `cuda_graphs` where there is nothing to capture."""
    if device.type != "cuda" or mode != "inference" or inputs is None:
        raise ValueError(
            "convert_to_sparse: expected a model on a CUDA device, mode='inference' and "
            "example_inputs with cuda_graphs=True, "
            f"got {device}, {mode!r} and {type(inputs).__name__}"
        )


def time_model(model, converted, taken, inputs, way, budget_s, folds, cuda_graphs=False):
    """Median milliseconds dense and sparse, and the median ratio of neighbouring samples.

    The ratio is that to the faster dense model where normalisations were folded; how long that one
    takes is left in `folds.model_ms`. `way` as for `time_layer`. With `cuda_graphs` both are
    replayed from one.
    """

    def dense():
        swap_back(model, taken)
        folds.undo()
        return run(model, inputs)

    def folded():
        folds.apply()
        return run(swap_back(model, taken), inputs)

    def sparse():
        folds.apply()
        swap(model, taken)
        return run(converted, inputs)

    run = _training_step if way == "training" else run_model
    # In eval mode also when training is timed: a conversion must leave batch statistics and the
    # random numbers of dropout as they were.
    twins = [twin for candidate in taken for twin in candidate.sparse]
    with eval_mode(model, *twins), called(way):
        sides = [dense, sparse, folded] if folds.names else [dense, sparse]
        try:
            if cuda_graphs:
                device = next(model.parameters()).device
                graphs = [capture([side], device) for side in sides]
                sides = [graph.replay for graph in graphs]
            times = interleaved(sides, budget_s=budget_s, min_rounds=7)
        finally:
            folds.apply()
    if folds.names:
        folds.model_ms = times[2].median_ms
    gain = min(speedup(side, times[1]).median for side in (times[0], *times[2:]))
    return times[0].median_ms, times[1].median_ms, gain


def ways_of(model: nn.Module, mode: str, cuda_graphs: bool) -> tuple[str, ...]:
    """The ways in which a model may be called that are to be timed."""
    if mode == "training":
        return ("training",)
    tensors = [*model.parameters(), *model.buffers()]
    tensors = [t for t in tensors if not isinstance(t, UninitializedTensorMixin)]
    if cuda_graphs or any(t.is_inference() for t in tensors):
        return WAYS[:1]
    # Without anything to differentiate by, gradients that are on make no difference to no_grad.
    return WAYS if any(t.requires_grad for t in tensors) else WAYS[:2]


def run_model(model: nn.Module, inputs):
    """The outputs of a model."""
    return forward_call(model, inputs)()


def runs(model: nn.Module, inputs, way: str) -> bool:
    """Whether a model can be called in a way; some have no gradients."""
    try:
        with eval_mode(model), called(way):
            run_model(model, inputs)
    except Exception:
        return False
    return True


def _training_step(model: nn.Module, inputs) -> None:
    """Forward and backward through the sum of all floating outputs."""
    with torch.enable_grad():
        leaves = tree_leaves(forward_call(model, inputs)())
        total = sum(t.float().sum() for t in leaves if isinstance(t, Tensor) and t.requires_grad)
        parameters = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(total, parameters, allow_unused=True)


def _shape_of(weight) -> tuple[int, ...]:
    """Empty for the weight of a lazy module, which has none yet."""
    known = isinstance(weight, Tensor) and not isinstance(weight, UninitializedTensorMixin)
    return tuple(weight.shape) if known else ()


def rows(candidate: Candidate) -> list[LayerReport]:
    """The lines of the report, one per layer of the group."""
    row = LayerReport(
        name="", kind="", shape=(), pattern=candidate.pattern, sparsity=candidate.sparsity,
        format=candidate.format if candidate.take else "dense", dense_ms=candidate.dense_ms,
        sparse_ms=candidate.sparse_ms, max_error=candidate.error, reason=candidate.reason,
        way=candidate.way,
    )  # fmt: skip
    found = [
        replace(row, name=s.name, kind=s.kind, shape=_shape_of(s.module.weight))
        for s in candidate.sites
    ]
    if not candidate.take:
        return found
    pairs = zip(found, candidate.sparse, strict=True)
    return [replace(row, activation=twin.activation) for row, twin in pairs]
