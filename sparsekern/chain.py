"""Which module alone reads the output of which layer, as seen in a run of a model."""

from __future__ import annotations

import bisect
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .measure.structure import forward_call

# These tell about a tensor, but read no element and hand out no view.
_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta")
_HARMLESS = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous,
    Tensor.is_floating_point, torch.is_floating_point, torch.numel, Tensor.untyped_storage,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Slot:
    """One place where a module hangs; a shared module has several.

    Attributes:
        module: The module.
        parent: The module that holds it.
        attribute: Its name there.
        name: Its name in the model.
    """

    module: nn.Module
    parent: nn.Module
    attribute: str
    name: str

    def put(self, module: nn.Module) -> None:
        """Hang another module there; cheap enough to be done between two timed calls."""
        self.parent._modules[self.attribute] = module


@dataclass
class Links:
    """What a run showed.

    Attributes:
        outputs: For each slot of a layer and each of its calls the slot whose module alone read
            the output, or None.
        inputs: For each slot of a reader and each of its calls the slot the input came from, or
            None where that is no watched layer or where others read the same tensor.
        dims: Number of dimensions of the last output of each slot of a layer.
        unsafe: Ids of modules that were called other than through a slot (a reference kept in a
            list, say) or whose weight was read by others.
    """

    outputs: dict[Slot, list[Slot | None]] = field(default_factory=dict)
    inputs: dict[Slot, list[Slot | None]] = field(default_factory=dict)
    dims: dict[Slot, int] = field(default_factory=dict)
    unsafe: set[int] = field(default_factory=set)

    def calls(self) -> Counter[int]:
        """How often each module was called, by its id."""
        counts: Counter[int] = Counter()
        for slot, seen in (*self.outputs.items(), *self.inputs.items()):
            counts[id(slot.module)] += len(seen)
        return counts


def slots(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Slot]:
    """Every place of every module that is `wanted`."""
    return [
        Slot(child, parent, attribute, f"{name}.{attribute}" if name else attribute)
        for name, parent in model.named_modules()
        for attribute, child in parent._modules.items()
        if child is not None and wanted(child)
    ]


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks or a patched forward would see that the module is gone or does more."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks or module._forward_pre_hooks
        or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip


def shallow_copy(module: nn.Module) -> nn.Module:
    """Another module with the same tensors and children, and hooks of its own."""
    twin = type(module).__new__(type(module))
    copied = {k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()}
    twin.__dict__.update(copied)
    return twin


def trace(model: nn.Module, inputs, layers: list[Slot], readers: list[Slot]) -> Links:
    """Run the model once and see who reads the outputs of `layers`.

    A reader counts as the only one when nothing else touched the memory of the tensor, through
    whatever view, before or after, and nobody kept it: the tensor is freed when the run ends. A
    reader that writes in place (nn.ReLU(inplace=True)) may be followed by others, they read what
    it wrote. During the run each slot holds a copy of its module, so that a module that hangs in
    several places is told apart; the model comes back as it was.
    """
    watch = _Watch()
    copies = [watch.layer(slot, shallow_copy(slot.module)) for slot in layers]
    copies += [watch.reader(slot, shallow_copy(slot.module)) for slot in readers]
    handles = [
        module.register_forward_pre_hook(lambda m, args: watch.links.unsafe.add(id(m)))
        for module in {slot.module for slot in (*layers, *readers)}
    ]
    try:
        for slot, copy in zip((*layers, *readers), copies, strict=True):
            slot.put(copy)
        with torch.no_grad(), _Functions(watch), _Operators(watch):
            result = forward_call(model, inputs)()
        watch.finish()
        del result  # until here: a tensor that is returned is one that was kept
    finally:
        for slot in (*layers, *readers):
            slot.put(slot.module)
        for handle in handles:
            handle.remove()
    return watch.links


def _key(tensor: Tensor) -> int | None:
    """The same for all tensors that share memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
        return None


class _Output:
    """The output of one call of a layer. Weak references: who else keeps it shows at the end."""

    def __init__(self, slot: Slot, index: int, tensor: Tensor):
        self.slot, self.index = slot, index
        self.tensor = weakref.ref(tensor)
        self.storage = StorageWeakRef(tensor.untyped_storage())  # its address is not used again
        self.reads = 0
        self.reader: tuple[Slot, int] | None = None
        self.reads_when_left = 0
        self.in_place = False

    def is_alone(self) -> bool:
        """Whether the reader was the only one."""
        if self.reader is None:
            return False
        return self.in_place or (self.reads == self.reads_when_left and self.storage.expired())


class _Watch:
    """Keeps account of the reads during a run."""

    def __init__(self):
        self.links = Links()
        self.outputs: dict[int, _Output] = {}
        # Weights by address, not by storage: all weights of a file may lie in one.
        self.owners: dict[int, nn.Module] = {}
        self.ends: dict[int, int] = {}
        self.starts: list[int] = []
        self.weights: Counter[int] = Counter()  # reads of each, those by its layer taken off

    def read(self, args, kwargs) -> None:
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, Tensor):
                continue
            key = _key(leaf)
            if key in self.outputs:
                self.outputs[key].reads += 1
            elif key is not None:
                self._read_weight(leaf.data_ptr())

    def _read_weight(self, address: int) -> None:
        index = bisect.bisect_right(self.starts, address) - 1
        if index >= 0 and address < self.ends[self.starts[index]]:
            self.weights[self.starts[index]] += 1

    def layer(self, slot: Slot, module: nn.Module) -> nn.Module:
        weight = module.weight.data_ptr()
        if weight not in self.owners:
            bisect.insort(self.starts, weight)
        self.owners[weight] = slot.module
        self.ends[weight] = weight + module.weight.numel() * module.weight.element_size()
        before: list[int] = []

        def enter(module, args):
            before.append(self.weights[weight])

        def leave(module, args, y):
            self.weights[weight] = before.pop()
            seen = self.links.outputs.setdefault(slot, [])
            self.outputs[_key(y)] = _Output(slot, len(seen), y)
            self.links.dims[slot] = y.dim()
            seen.append(None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module

    def reader(self, slot: Slot, module: nn.Module) -> nn.Module:
        entered: list[_Output | None] = []

        def enter(module, args, kwargs):
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            x = args[0] if alone else None
            output = None if x is None else self.outputs.get(_key(x))
            seen = self.links.inputs.setdefault(slot, [])
            if output and (output.reads or output.reader or output.tensor() is not x):
                output = None
            if output:
                output.reader = slot, len(seen)
            entered.append(output)
            seen.append(None)

        def leave(module, args, y):
            output = entered.pop()
            if output:
                output.reads_when_left = output.reads
                output.in_place = isinstance(y, Tensor) and _key(y) == output.storage.cdata

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)
        return module

    def finish(self) -> None:
        """Settle the links, while what the model returned is still held."""
        if not all(output.storage.expired() for output in self.outputs.values()):
            gc.collect()  # a tensor in a cycle of references is not one that is kept
        for output in self.outputs.values():
            if output.is_alone():
                reader, index = output.reader
                self.links.outputs[output.slot][output.index] = reader
                self.links.inputs[reader][index] = output.slot
        self.links.unsafe |= {id(self.owners[key]) for key, n in self.weights.items() if n}


class _Functions(TorchFunctionMode):
    """Reads from Python, also those that reach no operator, like `tolist` or `numpy`."""

    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in _HARMLESS:
            self.watch.read(args, kwargs)
        return function(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """Reads by operators, whoever calls them."""

    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.watch.read(args, kwargs)
        return function(*args, **kwargs)
