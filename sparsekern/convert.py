"""convert_to_sparse: swap pruned layers for sparse ones where that is measured to be faster."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .conversion import ConversionReport, LayerReport
from .measure.structure import check_inputs, forward_call
from .measure.timer import interleaved, speedup
from .nn import SparseConv2d, SparseLinear
from .patterns import detect
from .sites import Site, find_sites, find_sparse, group_tied
from .tune import MIN_GAIN, InputSpec, TuningCache, layer_key, time_layer
from .weights import FORMATS, fitting_formats

REPORT = "_sparsekern_report"
WORTH_TIMING = 0.3  # fewer zeros than this cannot win in any kernel we have
# Without example inputs nothing can be timed; these are the crossovers of the README's table for
# inputs of a few hundred tokens or pixels and more.
HEURISTIC = {"Linear": 0.7, "Conv1D": 0.7, "Conv2d": 0.8}


@dataclass
class _Candidate:
    """A group of layers with one weight, its sparse twins and what was measured."""

    sites: list[Site]
    sparsity: float = 0.0
    pattern: str = "unstructured"
    format: str = "csr"
    sparse: list[nn.Module] = field(default_factory=list)
    dense_ms: float | None = None
    sparse_ms: float | None = None
    error: float | None = None
    take: bool = False
    reason: str = ""


def convert_to_sparse(
    model: nn.Module,
    example_inputs=None,
    mode: str = "inference",
    *,
    min_gain: float = MIN_GAIN,
    budget_s: float = 0.15,
    cache: bool = True,
    progress: bool | None = None,
) -> nn.Module:
    """Swap pruned linear and convolution layers for sparse ones, where that is faster here.

    Every layer is timed dense against sparse at the shapes it saw in a run of `example_inputs`, and
    stays dense unless sparse wins by `min_gain`; the whole model is timed last and goes back if it
    lost. Layers keep exactly the zeros that are there. `sparsekern.report(model)` tells what
    happened to each layer.

    Args:
        model: Any module; changed in place. Shared and tied layers stay shared and tied.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments of the
            model (what a tokenizer returns is one).
            None: nothing is timed, a threshold on the sparsity decides (linear 70 %, convolution
            80 %), and the report says so.
        mode: `inference` times the forward pass; `training` times forward and both gradients and
            prepares the backward pass.
        min_gain: Least ratio dense time / sparse time to take a sparse layer.
        budget_s: Seconds of timing per distinct layer shape.
        cache: Keep timings in the user's cache folder, so that the next conversion is quick.
        progress: Show a progress bar; None shows it in a terminal when there is much to time.

    Returns:
        The model; a new layer if the model is a single layer that became sparse.

    Raises:
        TypeError: example_inputs of another kind.
        ValueError: unknown mode, no layer to convert, weights on several devices or with NaN. The
            model is then unchanged.
    """
    candidates = _check(model, mode, min_gain)
    if example_inputs is not None:
        check_inputs(example_inputs, "convert_to_sparse")
    report = ConversionReport(mode=mode)
    device = candidates[0].sites[0].module.weight.device
    specs = _record_inputs(model, candidates, example_inputs)
    tuning = TuningCache(device, on_disk=cache and example_inputs is not None)
    for candidate in _with_progress(candidates, progress):
        _decide(candidate, specs, mode, min_gain, budget_s, tuning)
    tuning.save()
    taken = [c for c in candidates if c.take]
    converted = _swap(model, taken)
    if taken and example_inputs is not None:
        converted = _confirm(model, converted, taken, example_inputs, report, budget_s)
    report.layers = [row for c in candidates for row in _rows(c)]
    object.__setattr__(converted, REPORT, report)
    return converted


def report(model: nn.Module) -> ConversionReport:
    """What `convert_to_sparse` did to this model, layer by layer.

    A model that was not converted (built from sparse layers, say) gets a report without times.
    """
    found = getattr(model, REPORT, None)
    if found is not None:
        return found
    rows = [
        LayerReport(
            site.name, site.kind, tuple(site.module.weight.shape), site.module.pattern,
            site.module.sparsity, site.module.weight.format, None, None, None,
            "sparse layer, not timed",
        )
        for site in find_sparse(model)
    ]  # fmt: skip
    return ConversionReport(layers=rows)


def to_dense(model: nn.Module) -> nn.Module:
    """Swap every sparse layer back for its dense twin, with the same weights and zeros.

    In place; returns the model, or the dense layer if the model is a single sparse one.
    """
    result = model
    tied: dict[int, nn.Parameter] = {}
    for site in find_sparse(model):
        dense = site.module.to_dense()
        inner = dense[0] if isinstance(dense, nn.Sequential) else dense
        inner.weight = tied.setdefault(id(site.module.weight), inner.weight)
        site.put(dense)
        if site.module is model:
            result = dense
    if REPORT in model.__dict__:
        object.__delattr__(model, REPORT)
    return result


def _check(model, mode: str, min_gain: float) -> list[_Candidate]:
    def refuse(wanted, got):
        raise ValueError(f"convert_to_sparse: expected {wanted}, got {got}")

    if not isinstance(model, nn.Module):
        refuse("model to be a torch.nn.Module", type(model).__name__)
    if mode not in ("inference", "training"):
        refuse("mode to be 'inference' or 'training'", repr(mode))
    if not min_gain > 0:
        refuse("min_gain > 0", min_gain)
    sites = find_sites(model)
    if not sites:
        refuse("a model with dense linear or convolution layers", "one with none")
    devices = {str(s.module.weight.device) for s in sites if isinstance(s.module.weight, Tensor)}
    if len(devices) > 1:
        refuse("all layers on one device", ", ".join(sorted(devices)))
    for site in sites:
        if not site.obstacle and not bool(torch.isfinite(site.weight).all()):
            refuse("finite weights", f"NaN or Inf in layer {site.name or '(the model)'!r}")
    return [_Candidate(group) for group in group_tied(sites)]


@contextmanager
def _eval_mode(*modules: nn.Module):
    """Dropout and batch statistics off; training flags are restored."""
    flags = [(m, m.training) for module in modules for m in module.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _record_inputs(model, candidates, example_inputs) -> dict[int, Counter] | None:
    """How often each layer saw which input, by id of the layer."""
    if example_inputs is None:
        return None
    specs: dict[int, Counter] = {}

    def remember(module, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        specs.setdefault(id(module), Counter())[InputSpec.of(x)] += 1

    modules = [s.module for c in candidates for s in c.sites if not s.obstacle]
    hooks = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in modules]
    try:
        with _eval_mode(model), torch.inference_mode():
            forward_call(model, example_inputs)()
    finally:
        for hook in hooks:
            hook.remove()
    return specs


def _with_progress(candidates, progress: bool | None):
    import sys

    show = progress if progress is not None else len(candidates) > 8 and sys.stderr.isatty()
    if not show:
        return candidates
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(candidates, "timing layers", console=console, transient=True)


def _decide(candidate, specs, mode, min_gain, budget_s, tuning) -> None:
    """Fill in what the candidate's layers gain, and whether to take them."""
    site = candidate.sites[0]
    obstacle = next((s.obstacle for s in candidate.sites if s.obstacle), "")
    if "weight" in site.module._parameters and not site.module.weight.is_meta:
        candidate.sparsity = float((site.weight == 0).float().mean()) if site.weight.numel() else 0
    if obstacle:
        candidate.reason = obstacle
        return
    if candidate.sparsity < WORTH_TIMING:
        candidate.reason = f"only {candidate.sparsity:.0%} zeros"
        return
    candidate.pattern = str(detect(site.weight))
    if specs is None:
        threshold = HEURISTIC[site.kind]
        candidate.take = candidate.sparsity >= threshold
        candidate.reason = f"heuristic, no example_inputs: sparse from {threshold:.0%} zeros"
    elif not any(id(s.module) in specs for s in candidate.sites):
        candidate.reason = "not called in the run of example_inputs"
        return
    shape, groups = site.weight.shape, getattr(site.module, "groups", 1)
    formats = fitting_formats(candidate.pattern, shape, groups)
    if specs is None:
        candidate.format = formats[0]
        candidate.sparse = _build(candidate, candidate.format, mode)
        return
    for name in formats:
        _try_format(candidate, name, specs, mode, budget_s, tuning)
    gain = candidate.dense_ms / candidate.sparse_ms
    candidate.take = gain >= min_gain
    candidate.reason = f"{'faster' if candidate.take else 'not faster'}: {gain:.2f}x"


def _try_format(candidate, name: str, specs, mode, budget_s, tuning) -> None:
    """Time one format; the candidate keeps the fastest one so far."""
    sparse = _build(candidate, name, mode)
    dense_ms, sparse_ms, error = _time(candidate.sites, sparse, specs, mode, budget_s, tuning)
    if (
        candidate.sparse_ms is None
        or sparse_ms / dense_ms < candidate.sparse_ms / candidate.dense_ms
    ):
        candidate.format, candidate.sparse = name, sparse
        candidate.dense_ms, candidate.sparse_ms, candidate.error = dense_ms, sparse_ms, error


def _build(candidate: _Candidate, name: str, mode: str) -> list[nn.Module]:
    """Sparse twins around one shared weight of a format."""
    first = candidate.sites[0]
    weight = FORMATS[name].from_dense(
        first.weight, pattern=candidate.pattern, groups=getattr(first.module, "groups", 1)
    )
    weight.values.requires_grad_(first.module.weight.requires_grad)
    if mode == "training":
        weight.prepare_training()
    layer = SparseConv2d if first.kind == "Conv2d" else SparseLinear
    return [layer.from_weight(weight, site.module) for site in candidate.sites]


def _time(sites, twins, specs, mode, budget_s, tuning) -> tuple[float, float, float]:
    """Milliseconds dense and sparse at the inputs seen, and the largest difference."""
    training = mode == "training"
    dense_ms = sparse_ms = error = 0.0
    for site, sparse in zip(sites, twins, strict=True):
        for spec, count in specs.get(id(site.module), {}).items():
            key = layer_key(sparse, spec, training)
            times = tuning.get(key)
            if times is None:
                times = time_layer(site.module, sparse, spec, training, budget_s)
                tuning.put(key, *times)
            dense_ms += count * times[0]
            sparse_ms += count * times[1]
            error = max(error, _difference(site.module, sparse, spec))
    return dense_ms, sparse_ms, error


def _difference(dense: nn.Module, sparse: nn.Module, spec: InputSpec) -> float:
    x = spec.make(dense.weight.device)
    with torch.inference_mode():
        gap = (dense(x).double() - sparse(x).double()).abs()
    return float(gap.max()) if gap.numel() else 0.0


def _swap(model: nn.Module, taken: list[_Candidate]) -> nn.Module:
    """Hang the sparse layers in; returns the model, or the layer that replaces it."""
    result = model
    for candidate in taken:
        for site, sparse in zip(candidate.sites, candidate.sparse, strict=True):
            site.put(sparse)
            result = sparse if site.module is model else result
    return result


def _swap_back(model: nn.Module, taken: list[_Candidate]) -> nn.Module:
    for candidate in taken:
        for site in candidate.sites:
            site.put(site.module)
    return model


def _confirm(model, converted, taken, inputs, report: ConversionReport, budget_s) -> nn.Module:
    """Time the whole model both ways; back to dense if sparse lost, or does not run."""
    try:
        report.model_dense_ms, report.model_sparse_ms, gain = _time_model(
            model, converted, taken, inputs, report.mode, 4 * budget_s
        )
    except Exception as error:
        _swap_back(model, taken)
        note = f"the converted model does not run, so it stays dense: {error!r}"
        warnings.warn(f"convert_to_sparse: {note}", stacklevel=3)
        return _revert(model, taken, report, "reverted: " + note)
    except BaseException:  # Ctrl-C: the model goes back as it came
        _swap_back(model, taken)
        raise
    if gain < 1:
        return _revert(model, taken, report, "reverted: the whole model was not faster")
    return _swap(model, taken)


def _revert(model, taken, report: ConversionReport, reason: str) -> nn.Module:
    report.reverted = True
    report.notes.append(reason)
    for candidate in taken:
        candidate.take, candidate.reason = False, f"{candidate.reason}; {reason.split(':')[0]}"
    return _swap_back(model, taken)


def _time_model(model, converted, taken, inputs, mode, budget_s):
    """Median milliseconds dense and sparse, and the median ratio of neighbouring samples."""

    def dense():
        return run(_swap_back(model, taken))

    def sparse():
        _swap(model, taken)
        return run(converted)

    def run(which):
        if mode == "inference":
            with torch.inference_mode():
                return forward_call(which, inputs)()
        return _training_step(which, inputs)

    # In eval mode also when training is timed: a conversion must leave batch statistics and the
    # random numbers of dropout as they were.
    twins = [twin for candidate in taken for twin in candidate.sparse]
    with _eval_mode(model, *twins):
        times = interleaved([dense, sparse], budget_s=budget_s, min_rounds=7)
    return times[0].median_ms, times[1].median_ms, speedup(*times).median


def _training_step(model: nn.Module, inputs) -> None:
    """Forward and backward through the sum of all floating outputs."""
    from torch.utils._pytree import tree_leaves

    with torch.enable_grad():
        leaves = tree_leaves(forward_call(model, inputs)())
        total = sum(t.float().sum() for t in leaves if isinstance(t, Tensor) and t.requires_grad)
        parameters = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(total, parameters, allow_unused=True)


def _rows(candidate: _Candidate) -> list[LayerReport]:
    row = LayerReport(
        name="", kind="", shape=(), pattern=candidate.pattern, sparsity=candidate.sparsity,
        format=candidate.format if candidate.take else "dense", dense_ms=candidate.dense_ms,
        sparse_ms=candidate.sparse_ms, max_error=candidate.error, reason=candidate.reason,
    )  # fmt: skip
    return [
        replace(row, name=s.name, kind=s.kind, shape=tuple(getattr(s.module.weight, "shape", ())))
        for s in candidate.sites
    ]
