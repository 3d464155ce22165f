"""Dense against sparse, side by side: time, throughput, memory, size, energy and output error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from sparsekern.measure.energy import POWERCAP, EnergyReading, find_meter, measure_energy
from sparsekern.measure.energy_model import count_operations, formula_text, modelled_energy
from sparsekern.measure.hardware import hardware
from sparsekern.measure.memory import extra_buffer_bytes, peak_forward_bytes, weight_bytes
from sparsekern.measure.structure import (
    check_inputs,
    common_device,
    evaluating,
    forward_call,
    output_error,
    tensors_of,
)
from sparsekern.measure.table import comparison_table
from sparsekern.measure.timer import Ratio, Timing, interleaved, speedup

ENERGY_CHOICES = ("measured", "modelled", "none")
UNITS = ("samples", "tokens")


@dataclass(frozen=True)
class Side:
    """Measurements of one of the two models.

    Attributes:
        latency: time of one forward pass, milliseconds.
        throughput: units (samples or tokens) per second at the median latency.
        peak_bytes: most memory one forward pass holds beyond weights and inputs; None where it
            cannot be observed.
        weight_bytes: parameters and persistent buffers, shared storage once.
        extra_buffer_bytes: non-persistent buffers, such as kernel schedules.
        energy: energy of one forward pass.
    """

    latency: Timing
    throughput: float
    peak_bytes: int | None
    weight_bytes: int
    extra_buffer_bytes: int
    energy: EnergyReading


@dataclass(frozen=True)
class Comparison:
    """A dense and a sparse model measured against each other.

    Attributes:
        dense: measurements of the dense model.
        sparse: measurements of the sparse model.
        speedup: dense time / sparse time over pairs of neighbouring samples.
        max_abs_error: largest absolute difference between the outputs.
        max_rel_error: the same over the largest absolute dense output.
        batch: size of the first dimension of the first input tensor.
        unit: what throughput counts, "samples" or "tokens".
        layers: one dict per layer of the conversion report, or empty when there is none.
        layers_sparse: layers that run a sparse kernel; None without a conversion report.
        layers_dense: layers the conversion kept dense; None without a conversion report.
        reverted: whether the conversion went back to the dense model; None without a report.
        hardware: the machine, as `hardware()` describes it.
        notes: how each figure came about.
    """

    dense: Side
    sparse: Side
    speedup: Ratio
    max_abs_error: float
    max_rel_error: float
    batch: int
    unit: str
    layers: tuple[dict[str, object], ...]
    layers_sparse: int | None
    layers_dense: int | None
    reverted: bool | None
    hardware: dict[str, object]
    notes: tuple[str, ...]

    @property
    def size_ratio(self) -> float:
        """Bytes of dense weights / bytes of sparse weights."""
        return self.dense.weight_bytes / self.sparse.weight_bytes

    @property
    def energy_ratio(self) -> float | None:
        """Joules of dense / joules of sparse; None when either is missing."""
        if not self.dense.energy.joules or not self.sparse.energy.joules:
            return None
        return self.dense.energy.joules / self.sparse.energy.joules

    def table(self) -> str:
        """The comparison as a text table."""
        return comparison_table(self)

    def to_dict(self) -> dict[str, object]:
        """All figures as plain values; infinities as the string "inf", samples included."""
        return {**plain(asdict(self)), "format": "sparsekern comparison", "version": 1}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(self, path: str | Path) -> Path:
        """Write a self-contained HTML report and return its path.

        Raises:
            OSError: if the file cannot be written; an older file at `path` is left as it was.
            ImportError: if matplotlib or jinja2 is missing.
        """
        from sparsekern.measure.report_html import write_comparison_html

        return write_comparison_html(path, self)

    def __str__(self) -> str:
        """The same as `table()`."""
        return self.table()


def plain(value):
    """The same value in lists, dicts, strings and finite numbers only, fit for strict JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def compare(
    dense: nn.Module,
    sparse: nn.Module,
    example_inputs,
    *,
    budget_s: float = 2.0,
    threads: int | None = None,
    energy: str = "measured",
    energy_window_s: float = 5.0,
    unit: str = "samples",
    powercap: Path = POWERCAP,
) -> Comparison:
    """Measure two models with the same interface against each other.

    Both run in evaluation and inference mode on the same inputs; training flags and the number of
    threads are put back at the end. The output error compares exactly the two models given: with
    the unpruned model as `dense` it contains the effect of pruning.

    Args:
        dense: the baseline.
        sparse: the model to judge, with outputs of the same structure.
        example_inputs: one tensor, a tuple of positional arguments or a dict of keyword arguments,
            on the models' device.
        budget_s: seconds of timing, both models together (at least five samples are taken).
        threads: CPU threads during the comparison; None keeps the present number.
        energy: "measured" (a counter, or "not available" with the reason), "modelled" (a counter
            if there is one, otherwise an estimate labelled so) or "none".
        energy_window_s: seconds per window when a counter is read (three windows per model, and
            one of idling).
        unit: what throughput counts: "samples" (first dimension of the first tensor) or "tokens"
            (first times second dimension).
        powercap: folder of Linux's RAPL counters.

    Returns:
        A `Comparison`.

    Raises:
        TypeError: if a model is no module or `example_inputs` is of another kind.
        ValueError: for an empty model, different devices, a different output structure or shape,
            or an argument out of range.
    """
    _check_arguments(budget_s, threads, energy, energy_window_s, unit)
    check_inputs(example_inputs, "compare")
    device = common_device(dense, sparse, example_inputs, "compare")
    batch, units = _count_units(example_inputs, unit)
    conversion = _conversion(sparse)
    fns = (forward_call(dense, example_inputs), forward_call(sparse, example_inputs))
    with use_threads(threads), evaluating(dense, sparse):
        absolute, relative = output_error(fns[0](), fns[1](), "compare")
        timings = interleaved(fns, budget_s=budget_s, device=device)
        observed = device.type in ("cpu", "cuda")
        peaks = [peak_forward_bytes(fn, device) if observed else None for fn in fns]
        readings, energy_note = _energy(
            energy, (dense, sparse), fns, example_inputs, device, energy_window_s, powercap
        )
        machine = hardware()
    sides = [
        Side(t, units / t.median_ms * 1e3, peak, weight_bytes(m), extra_buffer_bytes(m), reading)
        for m, t, peak, reading in zip((dense, sparse), timings, peaks, readings, strict=True)
    ]
    return Comparison(
        dense=sides[0],
        sparse=sides[1],
        speedup=speedup(*timings),
        max_abs_error=absolute,
        max_rel_error=relative,
        batch=batch,
        unit=unit,
        layers=tuple(asdict(layer) for layer in conversion.layers) if conversion else (),
        layers_sparse=conversion.n_sparse if conversion else None,
        layers_dense=len(conversion.layers) - conversion.n_sparse if conversion else None,
        reverted=conversion.reverted if conversion else None,
        hardware=machine,
        notes=_notes(timings, device, energy_note, conversion),
    )


def _check_arguments(budget_s, threads, energy, energy_window_s, unit) -> None:
    if not budget_s > 0:
        raise ValueError(f"compare: expected budget_s > 0 seconds, got {budget_s}")
    if not energy_window_s > 0:
        raise ValueError(f"compare: expected energy_window_s > 0 seconds, got {energy_window_s}")
    if threads is not None and threads < 1:
        raise ValueError(f"compare: expected threads >= 1 or None, got {threads}")
    if energy not in ENERGY_CHOICES:
        raise ValueError(f"compare: expected energy to be one of {ENERGY_CHOICES}, got {energy!r}")
    if unit not in UNITS:
        raise ValueError(f"compare: expected unit to be one of {UNITS}, got {unit!r}")


def _count_units(example_inputs, unit: str) -> tuple[int, int]:
    """Batch size, and units per forward pass."""
    first = next(iter(tensors_of(example_inputs).values()))
    wanted = 2 if unit == "tokens" else 1
    if first.dim() < wanted:
        raise ValueError(
            f"compare: expected the first input tensor to have at least {wanted} dimensions to "
            f"count {unit}, got shape {tuple(first.shape)}"
        )
    if first.numel() == 0:
        raise ValueError(f"compare: expected a non-empty first input, got {tuple(first.shape)}")
    batch = first.shape[0]
    return batch, batch * first.shape[1] if unit == "tokens" else batch


@contextmanager
def use_threads(threads: int | None):
    """Run the body with this many CPU threads; None leaves the number alone."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)


def _conversion(sparse: nn.Module):
    """The conversion report of the sparse model; None if it has no sparse or converted layer."""
    from sparsekern.convert import report

    found = report(sparse)
    return found if found.layers else None


def _energy(choice, models, fns, example_inputs, device, window_s, powercap):
    """Two readings and one sentence on how they came about."""
    if choice == "none":
        return [EnergyReading.missing("not asked for")] * 2, "Energy was not asked for."
    meter, reason = find_meter(device, powercap)
    if meter is not None:
        note = (
            f"Energy: {meter.source} counter ({reason}), windows of {window_s:g} s, dense and "
            "sparse interleaved; gross, and net of the idle power measured just before."
        )
        return measure_energy(fns, meter, device, window_s, idle_s=window_s), note
    if choice == "measured":
        return [EnergyReading.missing(reason)] * 2, f"Energy: not available: {reason}."
    counts = [count_operations(model, example_inputs) for model in models]
    note = f"Energy: no counter ({reason}), so modelled. {formula_text()} {_uncounted_text(counts)}"
    return [modelled_energy(count) for count in counts], note.strip()


def _uncounted_text(counts) -> str:
    names = sorted({name for count in counts for name in count.uncounted})
    return f"Counted as zero: {', '.join(names)}." if names else ""


def _notes(timings, device, energy_note, conversion) -> tuple[str, ...]:
    dense, sparse = timings
    memory = (
        "peak statistic of torch's CUDA allocator"
        if device.type == "cuda"
        else "running sum of torch's CPU allocator as its profiler sees it; what MKL, oneDNN and "
        "the per-thread scratch of our kernels take from the system is not seen"
    )
    notes = [
        f"Time: wall clock, dense and sparse in alternating order, {dense.rounds} samples each "
        f"({dense.calls} and {sparse.calls} calls per sample) after warm-up; speed-up is the "
        "median over pairs of neighbouring samples.",
        "Baseline: the dense model as given, run by torch in inference mode on the same inputs.",
        f"Peak memory: most memory one forward pass holds beyond weights and inputs ({memory}).",
        "Weights: parameters and persistent buffers, shared storage once. Unsaved buffers: in "
        "memory but in no file, such as kernel schedules, which are rebuilt on load.",
        "Output error: largest difference between the outputs of these two models; relative to "
        "the largest absolute dense output.",
        energy_note,
    ]
    if conversion is None:
        notes.append("Layers: the sparse model has no sparse layers.")
    else:
        notes += [f"Conversion: {text}" for text in (conversion.summary(), *conversion.notes)]
    return tuple(notes)
