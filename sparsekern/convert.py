"""convert_to_sparse: swap pruned layers for sparse ones where that is measured to be faster."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from .blocks import FusedBlock, fused_blocks
from .candidate import (
    Candidate,
    check_graphs,
    find_candidates,
    record_inputs,
    rows,
    swap,
    swap_back,
    time_model,
)
from .chain import slots
from .conversion import REPORT, ConversionReport, report
from .device import cold_bytes, format_fault
from .fuse import FUSABLE, TRAINABLE, Activations, Folds, Misread, check_agreement, run_once
from .measure.structure import check_inputs
from .measure.timer import synchronize
from .nn import SparseConv2d, SparseLinear
from .norm import ContiguousBatchNorm2d, faster_norms, find_norms
from .parts import RootSlot, faster_in_parts
from .patterns import detect
from .pool import ChannelsLastMaxPool2d, faster_pools
from .progress import track
from .sites import Site, find_sites, group_tied
from .tune import (
    MIN_GAIN,
    TuningCache,
    WrongResult,
    layer_key,
    output_error,
    time_layer,
)
from .weights import FORMATS, fitting_formats

WORTH_TIMING = 0.3  # fewer zeros than this cannot win in any kernel we have
# Without example inputs nothing can be timed; these are the crossovers of the README's table for
# inputs of a few hundred tokens or pixels and more.
HEURISTIC = {"Linear": 0.7, "Conv1D": 0.7, "Conv2d": 0.8}


def convert_to_sparse(
    model: nn.Module,
    example_inputs=None,
    mode: str = "inference",
    *,
    min_gain: float = MIN_GAIN,
    fuse: bool = True,
    budget_s: float = 0.15,
    cache: bool = True,
    progress: bool | None = None,
    cuda_graphs: bool = False,
) -> nn.Module:
    """Swap pruned linear and convolution layers for sparse ones, where that is faster here.

    Every layer is timed at the shapes it saw in a run of `example_inputs` and stays dense unless
    sparse wins by `min_gain`; the whole model is timed last and goes back if it lost. Layers keep
    exactly the zeros that are there; where a `Pruner` left a mask, it tells the pattern, and for
    training the weights to store. `sparsekern.report(model)` tells what happened to each layer.

    For inference (a model in eval mode) batch normalisation is folded into the layer before it, and
    ReLU, ReLU6 and GELU modules go into the sparse layers whose output they read, where a run shows
    that nothing else reads it (see `fold_batchnorm`); the outputs of the whole model are compared.
    Max pools run by way of channels_last where that is faster. The modules become an nn.Identity;
    `to_dense` brings activations back, a folded model stays folded. Blocks whose forward can be
    traced (torch.fx) get one in which convolutions add the residual, compute the activation behind
    the sum, and put the zeros of `F.pad` around their input. Depthwise convolutions are timed
    whatever their zeros. A batch of images runs in parts where that is measured to be faster and
    gives the same (without gradients, eagerly).

    For training nothing is folded, only ReLU is fused (its gradient needs no more than its output),
    max pools are chosen by forward and backward together, and batch normalisations, with the ReLU
    behind them, run by an op of ours where that is faster. The example inputs run in the mode
    the model is in; statistics of normalisations and random numbers come back as they were. Make
    the optimizer after the conversion: the sparse layers have parameters of their own. A pruned
    layer that stays dense trains its zeros, too; a `Pruner` keeps them where that matters.

    Args:
        model: Any module; changed in place. Shared and tied layers stay shared and tied.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments (what a
            tokenizer returns is one). None: nothing is timed, a threshold on the sparsity decides
            (linear 70 %, convolution 80 %; on a GPU all stay dense), and the report says so.
        mode: `inference` times the forward pass; `training` times forward and both gradients and
            prepares the backward pass.
        min_gain: Least ratio dense time / sparse time to take a sparse layer.
        fuse: Whether to fold normalisations, fuse activations and move max pools.
        budget_s: Seconds of timing per distinct layer shape.
        cache: Keep timings in the user's cache folder, so that the next conversion is quick.
        progress: Show a progress bar; None shows it in a terminal when there is much to time.
        cuda_graphs: Time replays of CUDA graphs, for a model that is served from one: what the host
            takes to launch kernels, which with few tokens is most of the time, then counts nothing.

    Returns:
        The model; a new layer if the model is a single layer that became sparse.

    Raises:
        TypeError: example_inputs of another kind.
        ValueError: unknown mode, no layer to convert, weights on several devices or with NaN,
            cuda_graphs without a GPU. The model is then unchanged.
    """
    candidates = find_candidates(model, mode, min_gain)
    if example_inputs is not None:
        check_inputs(example_inputs, "convert_to_sparse")
    device = candidates[0].sites[0].module.weight.device
    if cuda_graphs:
        check_graphs(device, mode, example_inputs)
    job = _Job(model, example_inputs, mode, min_gain, budget_s, cuda_graphs=cuda_graphs)
    job.tuning = TuningCache(device, on_disk=cache and example_inputs is not None)
    job.cold_bytes = cold_bytes(model, device)
    try:
        if fuse and example_inputs is not None:
            if mode == "inference":
                job.folds = Folds.find(model, example_inputs)
            job.fuse = not job.folds.reason
        return _convert(job, candidates, progress)
    except Misread as error:
        note = f"nothing folded or fused: {error}"
    job.folds, job.fuse, job.planned = Folds(), False, {}
    converted = _convert(job, find_candidates(model, mode, min_gain), progress)
    report(converted).notes.append(note)
    return converted


@dataclass
class _Job:
    """One conversion: what was asked for, and what was found out about the model."""

    model: nn.Module
    inputs: object
    mode: str
    min_gain: float
    budget_s: float
    fuse: bool = False
    folds: Folds = field(default_factory=Folds)
    specs: dict[int, Counter] | None = None  # how often each layer saw which input, by its id
    activations: Activations | None = None
    planned: dict[nn.Module, str] = field(default_factory=dict)  # layer -> activation to fuse
    tuning: TuningCache | None = None
    cold_bytes: int = 0
    cuda_graphs: bool = False


def _convert(job: _Job, candidates: list[Candidate], progress: bool | None) -> nn.Module:
    result = ConversionReport(mode=job.mode)
    job.folds.apply()
    try:
        if job.folds.names:
            candidates = [Candidate(group) for group in group_tied(find_sites(job.model))]
        _decide_all(job, candidates, progress)
        taken = [c for c in candidates if c.take]
        converted = swap(job.model, taken)
        if taken and job.fuse and job.mode == "inference" and _on_cpu(taken):
            taken[0].fused += fused_blocks(converted, job.inputs)
        if taken and job.inputs is not None:
            converted = _confirm(job, converted, taken, result)
    except BaseException:  # Ctrl-C too: the model goes back as it came
        swap_back(job.model, candidates)
        job.folds.undo()
        raise
    taken = [c for c in candidates if c.take]
    if not taken:
        job.folds.undo()
    elif job.fuse and job.mode == "inference" and converted is job.model and _on_cpu(taken):
        way, gain = faster_in_parts(converted, job.inputs, 4 * job.budget_s)
        if way is not None:
            RootSlot(converted).put(way)
            result.part_images, result.part_gain = way.size, gain
    _describe(result, job, candidates)
    object.__setattr__(converted, REPORT, result)
    return converted


def _decide_all(job: _Job, candidates: list[Candidate], progress: bool | None) -> None:
    """Choose for every candidate, build the sparse twins, settle which activations they take."""
    able = {s.module for c in candidates for s in c.sites if not s.obstacle}
    norms = find_norms(job.model) if job.fuse and job.mode == "training" else set()
    pools = {m for m in job.model.modules() if type(m) is nn.MaxPool2d}
    if job.inputs is not None:
        job.specs = record_inputs(job.model, job.inputs, able | norms | pools)
    if job.fuse:
        kinds = FUSABLE if job.mode == "inference" else TRAINABLE
        job.activations = Activations(job.model, job.inputs, able | norms, kinds)
        job.planned = job.activations.of_layers(able | norms)
    for candidate in track(candidates, "timing layers", progress):
        _decide(job, candidate)
    job.tuning.save()
    taken = [c for c in candidates if c.take]
    if taken:
        _fuse(job, taken, norms)


def _fuse(job: _Job, taken: list[Candidate], norms: set[nn.Module]) -> None:
    """Settle what hangs between the sparse layers: pools, normalisations, activations."""
    twins = {s.module: t for c in taken for s, t in zip(c.sites, c.sparse, strict=True)}
    training = job.mode == "training"
    if job.fuse and _on_cpu(taken):
        taken[0].fused = faster_pools(job.model, job.specs, job.budget_s, training)
        behind = {
            norm: (job.activations.module_after(norm), job.planned[norm])
            for norm in norms.intersection(job.planned)
        }
        stand_ins = faster_norms(norms, job.specs, behind, job.budget_s)
        places = slots(job.model, stand_ins.__contains__)
        taken[0].fused += [(slot, stand_ins[slot.module]) for slot in places]
        twins |= stand_ins
    if not job.planned:
        return
    final = job.activations.of_layers(set(twins))
    for module, twin in twins.items():
        twin.activation = final.get(module, "none")
    taken[0].fused += job.activations.places({m: twins[m] for m in final})


def _wins_dense(job: _Job, site: Site) -> bool:
    """Whether a layer may win without zeros: our kernel for depthwise convolutions does."""
    timed = job.mode == "inference" and job.specs is not None
    return timed and site.is_depthwise and site.module.weight.device.type == "cpu"


def _on_cpu(taken: list[Candidate]) -> bool:
    return taken[0].sites[0].module.weight.device.type == "cpu"


def _decide(job: _Job, candidate: Candidate) -> None:
    """Fill in what the candidate's layers gain, and whether to take them."""
    site = candidate.sites[0]
    obstacle = next((s.obstacle for s in candidate.sites if s.obstacle), "")
    candidate.count_zeros(job.mode == "training")
    if obstacle:
        candidate.reason = obstacle
        return
    if candidate.sparsity < WORTH_TIMING and not _wins_dense(job, site):
        candidate.reason = f"only {candidate.sparsity:.0%} zeros"
        return
    candidate.pattern = str(detect(site.weight if candidate.mask is None else candidate.mask))
    device = site.module.weight.device
    if job.specs is None and device.type != "cpu":
        candidate.reason = f"not timed: pass example_inputs, no threshold is known for {device}"
        return
    if job.specs is None:
        threshold = HEURISTIC[site.kind]
        candidate.take = candidate.sparsity >= threshold
        candidate.reason = f"heuristic, no example_inputs: sparse from {threshold:.0%} zeros"
    elif not any(id(s.module) in job.specs for s in candidate.sites):
        candidate.reason = "not called in the run of example_inputs"
        return
    shape, groups = site.weight.shape, getattr(site.module, "groups", 1)
    faults = {
        name: format_fault(name, site.kind, device)
        for name in fitting_formats(candidate.pattern, shape, groups)
    }
    formats = [name for name, fault in faults.items() if not fault]
    if not formats:
        candidate.take, candidate.reason = False, "; ".join(faults.values())
        return
    if job.specs is None:
        candidate.format = formats[0]
        candidate.sparse = _build(job, candidate, candidate.format)
        return
    _choose_format(job, candidate, formats)


def _choose_format(job: _Job, candidate: Candidate, formats: list[str]) -> None:
    """Time the formats that can run; take the fastest if it gains enough."""
    refused = [text for name in formats if (text := _try_format(job, candidate, name))]
    if candidate.sparse_ms is None:
        candidate.reason = "; ".join(refused)
        return
    gain = candidate.dense_ms / candidate.sparse_ms
    candidate.take = gain >= job.min_gain
    gained = f"{'faster' if candidate.take else 'not faster'}: {gain:.2f}x"
    candidate.reason = "; ".join([gained, *refused])


def _try_format(job: _Job, candidate: Candidate, name: str) -> str:
    """Time one format; the candidate keeps the fastest one so far. Says why if it cannot run."""
    device = candidate.sites[0].module.weight.device
    try:
        sparse = _build(job, candidate, name)
        dense_ms, sparse_ms, error = _time(job, candidate.sites, sparse)
    except Exception as error:
        if device.type == "cpu" and not isinstance(error, WrongResult):
            raise
        # A library too old, a kernel too large for this card: the layer stays dense and says so.
        # A card that was lost raises here as well, and the conversion ends.
        synchronize(device)
        return f"{name} does not run here: {(str(error) or repr(error)).strip().splitlines()[0]}"
    before = candidate.sparse_ms
    if before is None or sparse_ms / dense_ms < before / candidate.dense_ms:
        candidate.format, candidate.sparse = name, sparse
        candidate.dense_ms, candidate.sparse_ms, candidate.error = dense_ms, sparse_ms, error
    return ""


def _build(job: _Job, candidate: Candidate, name: str) -> list[nn.Module]:
    """Sparse twins around one shared weight of a format."""
    first = candidate.sites[0]
    weight = FORMATS[name].from_dense(
        first.weight, candidate.mask, candidate.pattern, getattr(first.module, "groups", 1)
    )
    weight.values.requires_grad_(first.module.weight.requires_grad)
    if job.mode == "training":
        weight.prepare_training()
    layer = SparseConv2d if first.kind == "Conv2d" else SparseLinear
    return [
        layer.from_weight(weight, site.module, job.planned.get(site.module, "none"))
        for site in candidate.sites
    ]


def _time(job: _Job, sites, twins) -> tuple[float, float, float]:
    """Milliseconds dense and sparse at the inputs seen, and the largest difference.

    Dense is the layer with the activation that may be fused.
    """
    training, graphs = job.mode == "training", job.cuda_graphs
    dense_ms = sparse_ms = error = 0.0
    for site, twin in zip(sites, twins, strict=True):
        dense, sparse = site.module, twin
        if site.module in job.planned:  # as they hang in the model, with an nn.Identity left behind
            dense = nn.Sequential(dense, job.activations.module_after(dense))
            sparse = nn.Sequential(twin, nn.Identity())
        for spec, count in job.specs.get(id(site.module), {}).items():
            key = layer_key(twin, spec, "CUDA graphs" if graphs else job.mode)
            times = job.tuning.get(key)
            if times is None:
                options = (training, job.budget_s, job.cold_bytes, graphs)
                times = time_layer(dense, sparse, spec, *options)
                job.tuning.put(key, *times)
            dense_ms += count * times[0]
            sparse_ms += count * times[1]
            error = max(error, output_error(dense, sparse, spec, twin.weight.device))
    return dense_ms, sparse_ms, error


def _confirm(job: _Job, converted, taken, result: ConversionReport) -> nn.Module:
    """Check and time the whole model; back to dense if sparse lost, or does not run."""
    if job.folds.names or any(c.fused for c in taken):
        result.fusion_error = _agreement(job, converted, taken)
    try:
        how = (job.mode, 4 * job.budget_s, job.folds, job.cuda_graphs)
        times = time_model(job.model, converted, taken, job.inputs, *how)
        result.model_dense_ms, result.model_sparse_ms, gain = times
    except Exception as error:
        note = f"the converted model does not run, so it stays dense: {error!r}"
        warnings.warn(f"convert_to_sparse: {note}", stacklevel=4)
        return _revert(job.model, taken, result, "reverted: " + note)
    result.model_folded_ms = job.folds.model_ms
    if gain < 1:
        than = " than dense with its normalisations folded" if job.folds.names else ""
        return _revert(job.model, taken, result, f"reverted: the whole model was not faster{than}")
    return swap(job.model, taken)


def _agreement(job: _Job, converted: nn.Module, taken) -> float | None:
    """How far the outputs are from those of the model as it came; Misread if it is no rounding."""
    swap_back(job.model, taken)
    job.folds.undo()
    want = run_once(job.model, job.inputs)
    job.folds.apply()
    swap(job.model, taken)
    dtype = taken[0].sites[0].module.weight.dtype
    try:
        return check_agreement(want, run_once(converted, job.inputs), dtype)
    except Exception as error:
        raise Misread(str(error)) from error


def _revert(model, taken, result: ConversionReport, reason: str) -> nn.Module:
    result.reverted = True
    result.notes.append(reason)
    for candidate in taken:
        candidate.take, candidate.reason = False, f"{candidate.reason}; {reason.split(':')[0]}"
    return swap_back(model, taken)


def _describe(result: ConversionReport, job: _Job, candidates: list[Candidate]) -> None:
    """Fill in the report."""
    result.layers = [row for c in candidates for row in rows(c)]
    taken = [c for c in candidates if c.take]
    if taken:
        result.folded = job.folds.names
        for slot, stand_in in (pair for c in taken for pair in c.fused):
            if isinstance(stand_in, FusedBlock):
                result.add_block(slot.name, stand_in.sums, stand_in.pads)
                continue
            kinds = {ChannelsLastMaxPool2d: result.pools, ContiguousBatchNorm2d: result.norms}
            kinds.get(type(stand_in), result.fused).append(slot.name)
        if job.folds.reason:
            result.notes.append(job.folds.reason)
