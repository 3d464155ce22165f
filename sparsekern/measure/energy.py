"""Energy as counters tell it: NVIDIA's total-energy counter, RAPL, or plainly nothing.

A reading always names its source. Where no counter can be read there are no joules, only the
reason; an estimate exists in `energy_model` and is made on request alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from sparsekern.measure.timer import quantiles, synchronize

POWERCAP = Path("/sys/class/powercap")
NOT_AVAILABLE = "not available"


@dataclass(frozen=True)
class EnergyReading:
    """Energy of one call.

    Attributes:
        joules: joules per call, everything the counter saw (median over windows); None when there
            is nothing to report.
        source: "nvml", "rapl", "modelled" or "not available".
        reason: why there are no joules, or what the number rests on.
        net_joules: joules per call above the idle power of the machine; None when not measured.
        p10_joules: 10th percentile over windows, joules per call; None when not measured.
        p90_joules: 90th percentile over windows, joules per call; None when not measured.
        calls: calls inside all windows together.
        seconds: length of all windows together.
        parts: joules per call by cause, for a modelled reading.
    """

    joules: float | None
    source: str
    reason: str = ""
    net_joules: float | None = None
    p10_joules: float | None = None
    p90_joules: float | None = None
    calls: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def missing(cls, reason: str) -> EnergyReading:
        """A reading without joules, with the reason."""
        return cls(None, NOT_AVAILABLE, reason)


class Meter(Protocol):
    """A counter of joules."""

    source: str
    covers: str

    def read(self) -> list[float]:
        """Present state of every counter, joules."""

    def joules(self, before: list[float], after: list[float]) -> float:
        """Joules between two states, at most one wrap of a counter apart."""


class RaplMeter:
    """Running Average Power Limit counters of all CPU packages, through Linux's sysfs.

    Only package domains count: cores and DRAM inside a package are sub-domains (`intel-rapl:0:0`)
    and `psys` is the whole platform, so adding them would count the same joules twice. The files
    are readable by root alone since CVE-2020-8694 and absent in most virtual machines. A counter
    wraps at `max_energy_range_uj`; windows must be shorter than one wrap (minutes on all parts).
    Source: Linux kernel documentation, "Power Capping Framework" (power/powercap).

    Args:
        root: folder that holds the `intel-rapl:N` folders.

    Raises:
        OSError: if there is no package domain or a counter cannot be read; the message says which.
    """

    source = "rapl"
    covers = "CPU packages, all processes on them"

    def __init__(self, root: Path = POWERCAP) -> None:
        """Find the package domains and read each of them once."""
        self._domains = [d for d in sorted(root.glob("intel-rapl:*")) if _is_package(d)]
        if not self._domains:
            raise FileNotFoundError(f"no RAPL package counter under {root}")
        self._ranges = [_read_microjoules(d / "max_energy_range_uj") for d in self._domains]
        self.read()

    def read(self) -> list[float]:
        """Present state of each package's counter, joules."""
        return [_read_microjoules(d / "energy_uj") for d in self._domains]

    def joules(self, before: list[float], after: list[float]) -> float:
        """Joules between two states; a counter that went back has wrapped once."""
        total = 0.0
        for start, end, span in zip(before, after, self._ranges, strict=True):
            total += end - start if end >= start else end + span - start
        return total


def _is_package(domain: Path) -> bool:
    if domain.name.count(":") != 1:
        return False
    return (domain / "name").read_text().strip().startswith("package")


def _read_microjoules(path: Path) -> float:
    text = path.read_text().strip()
    if not text.isdigit():
        raise OSError(f"expected a count of microjoules in {path}, got {text!r}")
    return int(text) * 1e-6


class NvmlMeter:
    """Total-energy counter of one NVIDIA GPU (Volta or newer), millijoules since driver load.

    The counter moves about every 100 ms and covers the whole card, so windows must last seconds
    and a card split by MIG is refused. Source: NVML reference,
    nvmlDeviceGetTotalEnergyConsumption.

    Args:
        device: a CUDA device; it is matched by UUID, because NVML ignores CUDA_VISIBLE_DEVICES.
        nvml: the `pynvml` module, or `sparsekern.measure.nvml.Nvml`.

    Raises:
        OSError: if the card has no such counter or is split by MIG.
    """

    source = "nvml"
    covers = "the whole GPU board"

    def __init__(self, device: torch.device, nvml) -> None:
        """Open the device and read its counter once."""
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._refuse_mig()
            self.read()
        except nvml.NVMLError as error:
            raise OSError(f"NVML has no energy counter for {device}: {error}") from error

    def _refuse_mig(self) -> None:
        try:
            current, _ = self._nvml.nvmlDeviceGetMigMode(self._handle)
        except self._nvml.NVMLError_NotSupported:
            return
        if current:
            raise OSError("the GPU is split by MIG and its counter covers the whole card")

    def read(self) -> list[float]:
        """Present state of the counter, joules."""
        return [self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) * 1e-3]

    def joules(self, before: list[float], after: list[float]) -> float:
        """Joules between two states."""
        return after[0] - before[0]


def find_meter(device: torch.device, powercap: Path = POWERCAP) -> tuple[Meter | None, str]:
    """The energy counter for work on `device`.

    Args:
        device: where the model runs.
        powercap: folder of Linux's power capping framework.

    Returns:
        A meter and what it covers, or None and the reason with the remedy.
    """
    try:
        meter = _nvml_meter(device) if device.type == "cuda" else RaplMeter(powercap)
    except PermissionError as error:
        return None, f"{error.filename} can be read by root only; run as root to measure energy"
    except FileNotFoundError as error:
        return None, f"{error}; virtual machines and containers usually have none"
    except (OSError, ImportError) as error:
        return None, str(error)
    return meter, meter.covers


def _nvml_meter(device: torch.device) -> NvmlMeter:
    return NvmlMeter(device, load_nvml())


def load_nvml():
    """NVML: the package nvidia-ml-py, or the driver's library itself.

    Raises:
        ImportError: there is neither.
    """
    try:
        import pynvml
    except ImportError:
        from .nvml import Nvml

        try:
            return Nvml()
        except OSError as error:
            raise ImportError(
                f"NVML, which counts a GPU's energy, cannot be loaded: {error}; install the "
                "driver, or pip install nvidia-ml-py"
            ) from error
    return pynvml


def measure_energy(
    fns: Sequence[Callable[[], object]],
    meter: Meter,
    device: torch.device,
    window_s: float = 5.0,
    windows: int = 3,
    idle_s: float = 3.0,
) -> list[EnergyReading]:
    """Energy per call of several functions, windows of seconds, interleaved.

    Idle power is read first, over `idle_s` seconds of sleep. Then each function fills one window
    per round by running again and again; the order of functions alternates between rounds. Reads
    happen at the ends of windows only, since polling a counter costs energy itself.

    Args:
        fns: functions without arguments.
        meter: the counter.
        device: the device to wait for before each read.
        window_s: seconds per window; several hundred times the counter's tick.
        windows: windows per function.
        idle_s: seconds of idling to measure.

    Returns:
        One `EnergyReading` per function.

    Raises:
        ValueError: if a length is not positive.
    """
    if not (fns and window_s > 0 and windows >= 1 and idle_s > 0):
        raise ValueError(
            "measure_energy: expected functions, window_s > 0, windows >= 1 and idle_s > 0, got "
            f"{len(fns)} functions, window_s={window_s}, windows={windows}, idle_s={idle_s}"
        )
    synchronize(device)
    idle, seconds, _ = _window(lambda: time.sleep(idle_s), meter, device, 0.0)
    idle_watts = idle / seconds
    samples: list[list[tuple[float, float, int]]] = [[] for _ in fns]
    for fn in fns:
        fn()
    for r in range(windows):
        order = range(len(fns)) if r % 2 == 0 else reversed(range(len(fns)))
        for i in order:
            samples[i].append(_window(fns[i], meter, device, window_s))
    return [_summarise(s, idle_watts, meter) for s in samples]


def _window(fn, meter: Meter, device, window_s: float) -> tuple[float, float, int]:
    """Joules, seconds and calls of at least `window_s` seconds and at least one call."""
    calls = 0
    before, start = meter.read(), time.perf_counter()
    while calls == 0 or time.perf_counter() - start < window_s:
        fn()
        calls += 1
        if calls % 8 == 0:  # a GPU's queue must not run ahead of the clock
            synchronize(device)
    synchronize(device)
    after, seconds = meter.read(), time.perf_counter() - start
    return meter.joules(before, after), seconds, calls


def _summarise(samples, idle_watts: float, meter: Meter) -> EnergyReading:
    p10, gross, p90 = quantiles([joules / calls for joules, _, calls in samples])
    net = quantiles([(j - idle_watts * s) / calls for j, s, calls in samples])[1]
    return EnergyReading(
        joules=gross,
        source=meter.source,
        reason=f"{meter.covers}; {len(samples)} windows; idle power {idle_watts:.1f} W",
        net_joules=net,
        p10_joules=p10,
        p90_joules=p90,
        calls=sum(calls for _, _, calls in samples),
        seconds=sum(s for _, s, _ in samples),
    )
