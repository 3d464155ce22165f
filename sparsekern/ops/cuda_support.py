"""What the CUDA implementations share: facts of a device, checks, statements, plan records.

The records solve one problem: the libraries want state that is made once per pattern (descriptors,
preprocessed buffers, packed weights), while an op is a function of tensors. A record belongs to the
storage of a `plan` tensor and dies with it. Contents of another plan (moved, copied, unpickled) are
not trusted: it gets a record of its own, made from the indices.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import _load

MAX_PLANS = 8  # per record; a plan of cuSPARSE holds a buffer on the device
_STATED: set[str] = set()
_RECORDS: dict[int, tuple[StorageWeakRef, Record]] = {}
_LOCK = threading.RLock()


@dataclass(frozen=True)
class Device:
    """What decides which kernels a device can run."""

    name: str
    capability: tuple[int, int]
    hip: bool = False


@functools.cache
def device_facts(index: int) -> Device:
    """Facts of a CUDA device; starts CUDA."""
    return Device(
        torch.cuda.get_device_name(index),
        torch.cuda.get_device_capability(index),
        torch.version.hip is not None,
    )


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the CPU, where tests run kernels."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def device_fault(device: Device, needed: tuple[int, int]) -> str:
    """Say why a device cannot run our kernels at all; empty when it can."""
    if device.hip:
        return f"expected an NVIDIA GPU, got {device.name} (ROCm)"
    if device.capability < needed:
        have, want = (".".join(map(str, c)) for c in (device.capability, needed))
        return f"expected a GPU of compute capability {want} or newer, got {have} ({device.name})"
    return ""


def half_fault() -> str:
    """Say why the compiled CUDA half is not there; empty when it is."""
    module, reason = _load.cuda_half()
    return "" if module else f"expected the compiled CUDA half, got none: {reason}"


@functools.cache
def triton_fault(module: str) -> str:
    """Say why the Triton kernels of a module beside this one cannot run; empty when they can."""
    try:
        importlib.import_module(f".{module}", __package__)
    except ImportError as error:
        return f"expected Triton, got none: {error}"
    return ""


def state_once(message: str) -> None:
    """Warn of a slower path, once per process and message."""
    if message not in _STATED:
        _STATED.add(message)
        warnings.warn(f"sparsekern: {message}", RuntimeWarning, stacklevel=2)


def refuse(op: str, wanted: str, got) -> None:
    """Raise RuntimeError in the form of the compiled ops."""
    raise RuntimeError(f"{op}: expected {wanted}, got {got}")


def check(condition, op: str, wanted: str, got) -> None:
    """Refuse unless the condition holds."""
    if not condition:
        refuse(op, wanted, got)


# Plain ifs: these run on every call, and to format a message costs as much as a launch.
def check_operand(op: str, name: str, t: Tensor, like: Tensor, dtype: torch.dtype) -> None:
    """Refuse a tensor of another device or dtype."""
    if t.device != like.device:
        refuse(op, f"{name} on the device of x ({like.device})", t.device)
    if t.dtype != dtype:
        refuse(op, f"{name} of dtype {dtype}", t.dtype)


def check_values(op: str, values: Tensor, x: Tensor) -> None:
    """Refuse values of another dtype or device than x."""
    if values.dtype != x.dtype:
        refuse(op, f"values of the dtype of x ({x.dtype})", values.dtype)
    check_operand(op, "values", values, x, x.dtype)


def check_last(op: str, grad: Tensor, rows: int) -> None:
    """Refuse a gradient whose last size is not the number of outputs."""
    if grad.shape[-1] != rows:
        refuse(op, f"grad.size(-1) = out_features = {rows}", grad.shape[-1])


def check_shape(op: str, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if tuple(t.shape) != shape:
        refuse(op, f"{name} of shape {shape}", tuple(t.shape))


def check_bias(op: str, bias: Tensor | None, x: Tensor, rows: int) -> None:
    """Refuse a bias of another device, dtype or size."""
    if bias is not None:
        check_operand(op, "bias", bias, x, x.dtype)
        check_shape(op, "bias", bias, (rows,))


def aligned(t: Tensor) -> Tensor:
    """Contiguous and at an address divisible by 16, which the libraries read at a time."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def capturing(like: Tensor) -> bool:
    """Whether a CUDA graph is being captured: nothing may synchronize then."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def ceil_div(a: int, b: int) -> int:
    """The least number of parts of b that make up a; triton.cdiv takes the host 3 us."""
    return -(-a // b)


def power_of_two(size: int) -> int:
    """The least power of two that is not smaller; as `ceil_div`, quicker than Triton's."""
    return 1 << max(0, size - 1).bit_length()


def stream_id(like: Tensor) -> int:
    """The current stream of the device of a tensor, without an object for it."""
    if like.is_cuda:
        return torch._C._cuda_getCurrentRawStream(like.get_device())
    return torch.cuda.current_stream(like.device).cuda_stream


def finish(y: Tensor, bias: Tensor | None, activation: str, op: str) -> Tensor:
    """Bias and activation after a product that has no epilogue; `y` may be overwritten."""
    from ._library import activate

    if bias is not None:
        y = y.add_(bias)
    return y.relu_() if activation == "relu" else activate(y, activation, op)


def _free(plans: OrderedDict) -> None:
    module, _ = _load.cuda_half()
    for number in plans.values():
        module.free_plan(number)
    plans.clear()


@dataclass(eq=False)
class Record:
    """What belongs to one plan tensor.

    Attributes:
        made: Tensors made here instead of the contents of a plan that is not ours.
        facts: What else is known, such as what `made` was made of.
        plans: Numbers of cuSPARSE plans by what they were made for, the last used at the end.
        pinned: Those that a captured graph uses; they live as long as the record.
        packed: Packed weights (see cuda_packed).
        quick: Ways by what a call has in common with an earlier one (see cuda_quick).
    """

    made: Tensor | None = None
    facts: dict = field(default_factory=dict)
    plans: OrderedDict = field(default_factory=OrderedDict)
    pinned: OrderedDict = field(default_factory=OrderedDict)
    packed: dict = field(default_factory=dict)
    quick: dict = field(default_factory=dict)

    def plan(self, key: tuple, like: Tensor, make: Callable[[], int]) -> int:
        """The number of a plan for this thread and stream, made when it is missing.

        A graph gets a plan for itself, because its replays may run beside eager calls. One that an
        eager call has prepared is handed over; otherwise its preparation is captured, too.
        """
        with _LOCK:
            if capturing(like):
                ready = next((k for k in self.plans if k[0] == key), None)
                number = self.plans.pop(ready) if ready else make()
                self.pinned[len(self.pinned)] = number
                return number
            full = (key, threading.get_ident(), stream_id(like) if like.is_cuda else 0)
            if full not in self.plans:
                self.plans[full] = make()
                while len(self.plans) > MAX_PLANS:
                    _load.cuda_half()[0].free_plan(self.plans.popitem(last=False)[1])
            self.plans.move_to_end(full)
            return self.plans[full]

    def __del__(self):
        if sys.is_finalizing():
            return
        for plans in (self.plans, self.pinned):
            if plans:
                _free(plans)


def remember(plan: Tensor, record: Record) -> Record:
    """Tie a record to the storage of a plan; records of freed storages are dropped."""
    storage = plan.untyped_storage()
    with _LOCK:
        for key in [k for k, (ref, _) in _RECORDS.items() if ref.expired()]:
            _RECORDS.pop(key)[1].quick.clear()  # its ways hold the record
        # The weak reference keeps the address from being given to another storage.
        _RECORDS[storage._cdata] = (StorageWeakRef(storage), record)
    return record


def recall(plan: Tensor) -> Record | None:
    """The record of a plan, None if the plan is not ours."""
    found = _RECORDS.get(plan.untyped_storage()._cdata)
    return found[1] if found else None
