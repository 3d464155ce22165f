"""Which layers become sparse, and in which format: timed at the inputs they see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from .candidate import Candidate
from .conversion import gain_text
from .device import format_fault
from .fuse import Activations, Folds
from .measure.timer import synchronize
from .nn import SparseConv2d, SparseLinear
from .patterns import detect
from .sites import Site
from .tune import WrongResult, is_close, layer_key, output_error, time_layer
from .tuning_cache import TuningCache
from .weights import FORMATS, fitting_formats

WORTH_TIMING = 0.3  # fewer zeros than this cannot win in any kernel we have
# Without example inputs nothing can be timed; these are the crossovers of the README's table for
# inputs of a few hundred tokens or pixels and more.
HEURISTIC = {"Linear": 0.7, "Conv1D": 0.7, "Conv2d": 0.8}
BRIEF = 3  # another way of calling gets this part of the budget: the kernel is known by then


@dataclass
class Job:
    """One conversion: what was asked for, and what was found out about the model.

    Attributes:
        ways: How the model may be called; the first is timed always, the others where the host's
            time could make the difference.
        specs: How often each layer saw which input, by its id.
        planned: The activation that may be fused into a layer.
        reads_weight: Why a layer must stay dense as others may read its weight, by its id.
        random: Whether a run of the model draws random numbers.
    """

    model: nn.Module
    inputs: object
    mode: str
    min_gain: float
    budget_s: float
    cuda_graphs: bool = False
    ways: tuple[str, ...] = ()
    fuse: bool = False
    random: bool = True
    folds: Folds = field(default_factory=Folds)
    specs: dict[int, Counter] | None = None
    activations: Activations | None = None
    norms: set[nn.Module] = field(default_factory=set)
    planned: dict[nn.Module, str] = field(default_factory=dict)
    reads_weight: dict[int, str] = field(default_factory=dict)
    tuning: TuningCache | None = None
    cold_bytes: int = 0


def decide(job: Job, candidate: Candidate) -> None:
    """Fill in what the candidate's layers gain, and whether to take them."""
    candidate.count_zeros(job.mode == "training")
    candidate.reason = _reason_to_stay(job, candidate)
    if candidate.reason:
        return
    site = candidate.sites[0]
    if job.specs is None:
        threshold = HEURISTIC[site.kind]
        candidate.take = candidate.sparsity >= threshold
        candidate.reason = f"heuristic, no example_inputs: sparse from {threshold:.0%} zeros"
    device = site.module.weight.device
    shape, groups = site.weight.shape, getattr(site.module, "groups", 1)
    faults = {
        name: format_fault(name, site.kind, device)
        for name in fitting_formats(candidate.pattern, shape, groups)
    }
    formats = [name for name, fault in faults.items() if not fault]
    if not formats:
        candidate.take, candidate.reason = False, "; ".join(faults.values())
    elif job.specs is None:
        candidate.format = formats[0]
        candidate.sparse = build(job, candidate, candidate.format)
    else:
        _choose_format(job, candidate, formats)


def _reason_to_stay(job: Job, candidate: Candidate) -> str:
    """Why the layers stay dense without being timed, or an empty string. Finds the pattern."""
    site = candidate.sites[0]
    obstacle = next((s.obstacle for s in candidate.sites if s.obstacle), "")
    if obstacle:
        return obstacle
    if candidate.sparsity < WORTH_TIMING and not _wins_dense(job, site):
        return f"only {candidate.sparsity:.0%} zeros"
    candidate.pattern = str(detect(site.weight if candidate.mask is None else candidate.mask))
    device = site.module.weight.device
    if job.specs is not None:
        called = any(id(s.module) in job.specs for s in candidate.sites)
        return "" if called else "not called in the run of example_inputs"
    if device.type != "cpu":
        return f"not timed: pass example_inputs, no threshold is known for {device}"
    reads = (job.reads_weight.get(id(s.module), "") for s in candidate.sites)
    return next(filter(None, reads), "")


def _wins_dense(job: Job, site: Site) -> bool:
    """Whether a layer may win without zeros: our kernel for depthwise convolutions does."""
    timed = job.mode == "inference" and job.specs is not None
    return timed and site.is_depthwise and site.module.weight.device.type == "cpu"


def _choose_format(job: Job, candidate: Candidate, formats: list[str]) -> None:
    """Time the formats that can run; take the fastest if it gains enough."""
    refused = [text for name in formats if (text := try_format(job, candidate, name))]
    if candidate.sparse_ms is None:
        candidate.reason = "; ".join(refused)
        return
    candidate.take = candidate.gain >= job.min_gain
    gained = "faster" if candidate.take else "not faster"
    if candidate.take and candidate.gain < 1:
        gained = f"slower, which min_gain={job.min_gain:g} allows"
    gained = f"{gained}: {gain_text(candidate.gain, candidate.way)}"
    candidate.reason = "; ".join([gained, *refused])


def try_format(job: Job, candidate: Candidate, name: str) -> str:
    """Time one format; the candidate keeps the fastest one so far. Says why if it cannot run."""
    device = candidate.sites[0].module.weight.device
    try:
        sparse = build(job, candidate, name)
        way, dense_ms, sparse_ms = _slowest_way(job, candidate.sites, sparse)
        error = max(
            output_error(dense, twin, spec, device)
            for dense, twin, spec, _ in _calls(job, candidate.sites, sparse)
        )
    except Exception as error:
        if device.type == "cpu" and not isinstance(error, WrongResult):
            raise
        # A library too old, a kernel too large for this card: the layer stays dense and says so.
        # A card that was lost raises here as well, and the conversion ends.
        synchronize(device)
        return f"{name} does not run here: {(str(error) or repr(error)).strip().splitlines()[0]}"
    if candidate.sparse_ms is None or dense_ms / sparse_ms > candidate.gain:
        candidate.format, candidate.sparse, candidate.way = name, sparse, way
        candidate.dense_ms, candidate.sparse_ms, candidate.error = dense_ms, sparse_ms, error
    return ""


def build(job: Job, candidate: Candidate, name: str) -> list[nn.Module]:
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


def _slowest_way(job: Job, sites: list[Site], twins: list[nn.Module]) -> tuple[str, float, float]:
    """The way of calling in which sparse gains least, with milliseconds dense and sparse."""
    first, *others = job.ways
    times = {first: _time(job, sites, twins, first, job.budget_s)}
    dense_ms, sparse_ms = times[first]
    count = sum(count for *_, count in _calls(job, sites, twins))
    if is_close(dense_ms, sparse_ms, job.min_gain, count):
        for way in others:
            times[way] = _time(job, sites, twins, way, job.budget_s / BRIEF)
    way = min(times, key=lambda name: times[name][0] / times[name][1])
    return way, *times[way]


def _time(job: Job, sites, twins, way: str, budget_s: float) -> tuple[float, float]:
    """Milliseconds dense and sparse of all calls in one run of the model, in one way of calling."""
    dense_ms = sparse_ms = 0.0
    for dense, twin, spec, count in _calls(job, sites, twins):
        layer = twin[0] if isinstance(twin, nn.Sequential) else twin
        key = layer_key(layer, spec, "CUDA graphs" if job.cuda_graphs else way)
        times = job.tuning.get(key)
        if times is None:
            times = time_layer(dense, twin, spec, way, budget_s, job.cold_bytes, job.cuda_graphs)
            job.tuning.put(key, *times)
        dense_ms += count * times[0]
        sparse_ms += count * times[1]
    return dense_ms, sparse_ms


def _calls(job: Job, sites, twins) -> Iterator[tuple[nn.Module, nn.Module, object, int]]:
    """Each layer dense and sparse, with an input it saw and how often.

    With the activation that may be fused: dense as they hang in the model, sparse with an
    nn.Identity left behind.
    """
    for site, twin in zip(sites, twins, strict=True):
        dense, sparse = site.module, twin
        if dense in job.planned:
            sparse = nn.Sequential(twin, nn.Identity())
            dense = nn.Sequential(dense, job.activations.module_after(dense))
        for spec, count in job.specs.get(id(site.module), {}).items():
            yield dense, sparse, spec, count
