"""convert_to_sparse: swap pruned layers for sparse ones where that is measured to be faster."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import torch
from torch import nn

from .blocks import FusedBlock, fused_blocks
from .candidate import (
    Candidate,
    check_graphs,
    find_candidates,
    record_inputs,
    rows,
    runs,
    settle_list,
    swap,
    swap_back,
    time_model,
    ways_of,
)
from .chain import slots
from .choose import Job, decide
from .conversion import REPORT, ConversionReport, gain_text, report
from .device import cold_bytes
from .fuse import FUSABLE, TRAINABLE, Activations, Folds, Misread, check_agreement, run_once
from .measure.structure import check_inputs
from .norm import ContiguousBatchNorm2d, faster_norms, find_norms
from .old_optimizers import warn_old_optimizers
from .parts import RootSlot, faster_in_parts
from .pool import ChannelsLastMaxPool2d, faster_pools
from .progress import track
from .sites import find_left_out, find_sites, group_tied
from .snapshot import whole_or_not_at_all
from .tune import MIN_GAIN, device_key, is_close
from .tuning_cache import TuningCache
from .weight_reads import readers

MODEL_GAIN = 1.02  # the least of the whole model, in every way of calling it
SURE_GAIN = 1.25  # where the whole model lost, layers that win by less alone are left out


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
    sparse wins by `min_gain`; the whole model is timed last and goes back if it lost. Both count in
    each way a model is called: under inference_mode, under no_grad, and plainly, with gradients on.
    Layers keep exactly the zeros that are there; where a `Pruner` left a mask, it tells the
    pattern, and for training the weights to store. `sparsekern.report(model)` tells what happened
    to each layer.

    For inference (a model in eval mode) batch normalisation is folded into the layer before it, and
    ReLU, ReLU6 and GELU modules go into the sparse layers whose output they read, where a run shows
    that nothing else reads it (see `fold_batchnorm`); the outputs of the whole model are compared.
    Max pools run by way of channels_last where that is faster. The modules become an nn.Identity;
    `to_dense` brings activations back, a folded model stays folded. Blocks whose forward can be
    traced get one in which convolutions add the residual, compute the activation behind
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
            tokenizer returns is one), a list of positional arguments or for a model that takes a
            list. None: nothing is timed, a threshold on the sparsity decides (linear 70 %,
            convolution 80 %; on a GPU all stay dense, and so does a layer whose weight the code of
            the model may read itself), and the report says so.
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
            cuda_graphs without a GPU, a list the model does not take. The model is as it was after
            any exception, Ctrl-C included.
    """
    candidates = find_candidates(model, mode, min_gain)
    if not isinstance(budget_s, (int, float)) or not budget_s > 0:
        raise ValueError(f"convert_to_sparse: expected budget_s > 0 seconds, got {budget_s!r}")
    before = list(model.parameters())
    # Parameters made under the caller's inference_mode could not be called with gradients on.
    with torch.inference_mode(False), whole_or_not_at_all(model):
        if example_inputs is not None:
            check_inputs(example_inputs, "convert_to_sparse")
            example_inputs = settle_list(model, example_inputs)
        device = candidates[0].sites[0].module.weight.device
        if cuda_graphs:
            check_graphs(device, mode, example_inputs)
        job = Job(model, example_inputs, mode, min_gain, budget_s, cuda_graphs)
        job.ways = ways_of(model, mode, cuda_graphs)
        on_disk = cache and example_inputs is not None
        job.tuning = TuningCache(device_key(device) if on_disk else "", on_disk)
        job.cold_bytes = cold_bytes(model, device)
        with _tensors_made_on(device), _random_numbers_kept(job):
            converted = _convert_or_not_fused(job, candidates, fuse, progress)
        if mode == "training":
            warn_old_optimizers(before, converted)
    return converted


@contextmanager
def _tensors_made_on(device: torch.device):
    """New tensors lie with the model, where the caller's default device is another (meta, say)."""
    if torch.get_default_device().type in ("cpu", device.type):
        yield
        return
    with device:
        yield


@contextmanager
def _random_numbers_kept(job: Job):
    """They come back as they were; not touched at all where the model draws none.

    They belong to the whole process: other threads may be drawing.
    """
    if job.inputs is None:
        yield
        return
    state, gpus = torch.get_rng_state(), []
    if torch.cuda.is_initialized():
        gpus = torch.cuda.get_rng_state_all()
    try:
        yield
    finally:
        if job.random:
            torch.set_rng_state(state)
            if gpus:
                torch.cuda.set_rng_state_all(gpus)


def _convert_or_not_fused(job: Job, candidates: list[Candidate], fuse: bool, progress):
    """The converted model; without folding and fusing where the model was misread."""
    try:
        if fuse and job.inputs is not None:
            if job.mode == "inference":
                job.folds = Folds.find(job.model, job.inputs)
            job.fuse = not job.folds.reason
        return _convert(job, candidates, progress)
    except Misread as error:
        note = f"nothing folded or fused: {error}"
    job.folds, job.fuse, job.planned, job.norms = Folds(), False, {}, set()
    converted = _convert(job, find_candidates(job.model, job.mode, job.min_gain), progress)
    report(converted).notes.append(note)
    return converted


def _convert(job: Job, candidates: list[Candidate], progress: bool | None) -> nn.Module:
    result = ConversionReport(mode=job.mode)
    job.folds.apply()
    try:
        if job.folds.names:
            candidates = [Candidate(group) for group in group_tied(find_sites(job.model))]
        _decide_all(job, candidates, progress)
        converted = _install(job, candidates, result)
    except BaseException:  # a Misread is converted once more, from the model as it came
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


def _decide_all(job: Job, candidates: list[Candidate], progress: bool | None) -> None:
    """Choose for every candidate and build the sparse twins."""
    able = {s.module for c in candidates for s in c.sites if not s.obstacle}
    if job.fuse and job.mode == "training":
        job.norms = find_norms(job.model)
    pools = {m for m in job.model.modules() if type(m) is nn.MaxPool2d}
    if job.inputs is None:
        job.reads_weight = readers(job.model)
    else:
        state = torch.get_rng_state()
        job.specs = record_inputs(job.model, job.inputs, able | job.norms | pools)
        # A part in training mode may draw in the runs that are in the mode of the model.
        in_training = any(m.training for m in job.model.modules())
        job.random = in_training or not torch.equal(state, torch.get_rng_state())
    if job.fuse:
        kinds = FUSABLE if job.mode == "inference" else TRAINABLE
        job.activations = Activations(job.model, job.inputs, able | job.norms, kinds)
        job.planned = job.activations.of_layers(able | job.norms)
    for candidate in track(candidates, "timing layers", progress):
        decide(job, candidate)
    job.tuning.save()


def _install(job: Job, candidates: list[Candidate], result: ConversionReport) -> nn.Module:
    """Hang in the layers that are taken, if the whole model gains by it.

    Where it does not, once more with the layers about which there is no doubt.
    """
    taken = [c for c in candidates if c.take]
    why = _try_whole(job, taken, result)
    surer = _surer(job, taken, result) if why else []
    if surer:
        _leave_out([c for c in taken if c not in surer], f"left out: {why}")
        result.notes.append(f"once more with the {len(surer)} surest weights: {why}")
        taken, why = surer, _try_whole(job, surer, result)
    if why:
        result.reverted = True
        result.notes.append(f"reverted: {why}")
        _leave_out(taken, "reverted")
        return job.model
    return swap(job.model, taken)


def _surer(job: Job, taken: list[Candidate], result: ConversionReport) -> list[Candidate]:
    """Part of the layers, with which the model may win; none where that is no part."""
    if result.model_gain is None:  # it does not run
        read = readers(job.model)
        sure = [c for c in taken if not any(id(s.module) in read for s in c.sites)]
    else:
        sure = [c for c in taken if c.gain >= SURE_GAIN]
    return sure if len(sure) < len(taken) else []


def _leave_out(layers: list[Candidate], reason: str) -> None:
    for candidate in layers:
        candidate.take, candidate.reason = False, f"{candidate.reason}; {reason}"


def _try_whole(job: Job, taken: list[Candidate], result: ConversionReport) -> str:
    """Fuse, check and time the whole model, which comes back dense; why it lost, or nothing."""
    if not taken:
        return ""
    _fuse(job, taken)
    converted = swap(job.model, taken)
    if job.fuse and job.mode == "inference" and _on_cpu(taken):
        taken[0].fused += fused_blocks(converted, job.inputs)
    why = "" if job.inputs is None else _confirm(job, converted, taken, result)
    swap_back(job.model, taken)
    return why


def _fuse(job: Job, taken: list[Candidate]) -> None:
    """Settle what hangs between the sparse layers: pools, normalisations, activations."""
    twins = {s.module: t for c in taken for s, t in zip(c.sites, c.sparse, strict=True)}
    for candidate in taken:
        candidate.fused = []
    training = job.mode == "training"
    if job.fuse and _on_cpu(taken):
        taken[0].fused = faster_pools(job.model, job.specs, job.budget_s, training)
        behind = {
            norm: (job.activations.module_after(norm), job.planned[norm])
            for norm in job.norms.intersection(job.planned)
        }
        stand_ins = faster_norms(job.norms, job.specs, behind, job.budget_s)
        places = slots(job.model, stand_ins.__contains__)
        taken[0].fused += [(slot, stand_ins[slot.module]) for slot in places]
        twins |= stand_ins
    if not job.planned:
        return
    final = job.activations.of_layers(set(twins))
    for module, twin in twins.items():
        twin.activation = final.get(module, "none")
    taken[0].fused += job.activations.places({m: twins[m] for m in final})


def _on_cpu(taken: list[Candidate]) -> bool:
    return taken[0].sites[0].module.weight.device.type == "cpu"


def _confirm(job: Job, converted, taken: list[Candidate], result: ConversionReport) -> str:
    """Check and time the whole model, sparse as it comes; why it stays dense, or nothing."""
    if job.folds.names or any(c.fused for c in taken):
        result.fusion_error = _agreement(job, converted, taken)
    result.model_gains, result.model_gain = {}, None
    try:
        _time_ways(job, converted, taken, result)
    except Exception as error:
        result.model_gain = None
        note = f"the converted model does not run, so it stays dense: {error!r}"
        warnings.warn(f"convert_to_sparse: {note}", stacklevel=7)
        return note
    if result.model_gain >= _least_gain(job):
        return ""
    than = " than dense with its normalisations folded" if job.folds.names else ""
    return f"the whole model was not faster{than}: {gain_text(result.model_gain, result.model_way)}"


def _least_gain(job: Job) -> float:
    """Of the whole model; who asks for layers that win by less gets them, if nothing is lost."""
    return min(MODEL_GAIN, max(1.0, job.min_gain))


def _time_ways(job: Job, converted, taken, result: ConversionReport) -> None:
    """Time the whole model in the ways that may decide; the report gets the one that does."""
    calls = sum(job.specs[id(s.module)].total() for c in taken for s in c.sites
                if id(s.module) in job.specs)  # fmt: skip
    budget_s = 4 * job.budget_s
    for way in job.ways:
        if way != job.ways[0] and not _runs_dense(job, taken, way):
            continue
        how = (job.inputs, way, budget_s, job.folds, job.cuda_graphs)
        dense_ms, sparse_ms, gain = time_model(job.model, converted, taken, *how)
        result.model_gains[way] = gain
        if result.model_gain is None or gain < result.model_gain:
            result.model_gain, result.model_way = gain, way
            result.model_dense_ms, result.model_sparse_ms = dense_ms, sparse_ms
            result.model_folded_ms = job.folds.model_ms
        # What stands between the layers has its share.
        if not is_close(gain * sparse_ms, sparse_ms, _least_gain(job), 2 * calls):
            break
        budget_s = 2 * job.budget_s
    swap(job.model, taken)


def _runs_dense(job: Job, taken: list[Candidate], way: str) -> bool:
    """Whether the dense model can be called in this way at all."""
    return runs(swap_back(job.model, taken), job.inputs, way)


def _agreement(job: Job, converted, taken) -> float | None:
    """How far the outputs are from those of the model as it came; Misread if it is no rounding."""
    swap_back(job.model, taken)
    job.folds.undo()
    want = run_once(job.model, job.inputs, job.random)
    job.folds.apply()
    swap(job.model, taken)
    dtype = taken[0].sites[0].module.weight.dtype
    try:
        return check_agreement(want, run_once(converted, job.inputs, job.random), dtype)
    except Exception as error:
        raise Misread(str(error)) from error


def _describe(result: ConversionReport, job: Job, candidates: list[Candidate]) -> None:
    """Fill in the report."""
    result.layers = [row for c in candidates for row in rows(c)]
    result.left_out = find_left_out(job.model)
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
        if job.folds.strange:
            names = ", ".join(job.folds.strange)
            result.notes.append(f"not folded, as they compute more than a normalisation: {names}")
