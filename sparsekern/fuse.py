"""Give the work of modules that follow a layer to the layer: normalisation and activation."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .chain import Links, Slot, is_hooked, shallow_copy, slots, trace
from .fold import find_folds, stand_in, strange_norms, training_part, with_parameters
from .measure.structure import forward_call, output_error, tensors_of
from .ops._library import activate
from .snapshot import undisturbed
from .traced_state import Watch

FUSABLE = ("relu", "relu6", "gelu", "gelu_tanh")
TRAINABLE = ("relu", "relu6")  # the gradients of GELU would compute the layer once more
# A run of the fused model must agree with the model as it came to this share of the largest output.
# Rounding stays far below; a path through the model that was misread does not.
AGREEMENT = {torch.float64: 1e-2, torch.float32: 1e-2}


class Misread(Exception):
    """The run of the example inputs did not show all that the model does."""


@contextmanager
def _observing():
    try:
        yield
    except Exception as error:
        raise Misread(f"a run could not be watched, {error!r}") from error


class FusedActivation(nn.Identity):
    """Stands where an activation was that sparse layers compute now.

    Attributes:
        fused: (the activation, the layers that compute it); a tuple, so that none of them becomes
            a child of this module.
    """

    def __init__(self, activation: nn.Module, layers: tuple[nn.Module, ...]):
        super().__init__()
        self.fused = activation, layers
        self.training = activation.training

    def extra_repr(self) -> str:
        """What was there."""
        return type(self.fused[0]).__name__


@dataclass(frozen=True)
class _Swap:
    """Two modules that take turns in one place."""

    slot: Slot
    other: nn.Module


@dataclass
class Folds:
    """The normalisations of a model that can be folded, and the way there and back.

    Attributes:
        names: Names of the normalisations.
        reason: Why none were looked for, or an empty string.
        strange: Names of normalisations of classes that compute something else, too.
        model_ms: Median time of the folded dense model, None until it was timed.
    """

    names: list[str] = field(default_factory=list)
    reason: str = ""
    strange: list[str] = field(default_factory=list)
    model_ms: float | None = None
    swaps: list[_Swap] = field(default_factory=list)

    @classmethod
    def find(cls, model: nn.Module, inputs) -> Folds:
        """Look for what can be folded; the model is not changed."""
        training = training_part(model)
        if training is not None:
            what = f"{training!r}" if training else "the model"
            return cls(reason=f"nothing folded or fused: {what} is in training mode")
        self = cls(strange=strange_norms(model))
        with _observing():
            folds = find_folds(model, inputs)
        for layer, norm, weight, bias in folds:
            twin = with_parameters(layer, weight, bias)
            self.swaps += [_Swap(s, twin) for s in slots(model, lambda m, x=layer: m is x)]
            places = slots(model, lambda m, x=norm: m is x)
            self.swaps += [_Swap(slot, stand_in(norm)) for slot in places]
            self.names += [slot.name for slot in places]
        return self

    def apply(self) -> None:
        """The folded model."""
        for swap in self.swaps:
            swap.slot.put(swap.other)

    def undo(self) -> None:
        """The model as it was, the same modules and parameters."""
        for swap in self.swaps:
            swap.slot.put(swap.slot.module)


class Activations:
    """The activations of a model that layers could compute themselves.

    An activation module can go where each of its calls reads the output of such a layer and nothing
    else reads that output; a layer can take it over where all its outputs go to activations of one
    kind. What a module computes is found by its values on a probe, not by its name.
    """

    def __init__(self, model: nn.Module, inputs, layers: set[nn.Module], kinds=FUSABLE):
        self.links = Links()
        sources = slots(model, lambda m: m in layers)
        readers = slots(model, _is_stateless)
        if sources and readers:
            with _observing(), undisturbed(model):
                self.links = trace(model, inputs, sources, readers)
        found = {
            slot: kind_of_activation(slot.module, seen[0].module.weight.dtype)
            for slot, seen in self.links.inputs.items()
            if None not in seen and id(slot.module) not in self.links.unsafe
        }
        self.kinds = {slot: kind for slot, kind in found.items() if kind in kinds}

    def of_layers(self, layers: set[nn.Module]) -> dict[nn.Module, str]:
        """Layer -> activation, if exactly these layers were to become sparse."""
        outputs: dict[nn.Module, list[Slot | None]] = {}
        for slot, readers in self.links.outputs.items():
            outputs.setdefault(slot.module, []).extend(readers)
        able = {la for la in outputs if la in layers and id(la) not in self.links.unsafe}
        places = set(self.kinds)
        before = None
        while before != (len(able), len(places)):  # each refusal may take others with it
            before = len(able), len(places)
            places = {p for p in places if all(s.module in able for s in self.links.inputs[p])}
            able = {
                la
                for la in able
                if places.issuperset(outputs[la]) and len({self.kinds[p] for p in outputs[la]}) == 1
            }
        return {la: self.kinds[outputs[la][0]] for la in able}

    def module_after(self, layer: nn.Module) -> nn.Module:
        """The activation module that reads what `layer` gives."""
        return next(r[0].module for s, r in self.links.outputs.items() if s.module is layer)

    def places(self, twins: dict[nn.Module, nn.Module]) -> list[tuple[Slot, FusedActivation]]:
        """What takes the place of the activations, given each fused layer's sparse twin."""
        found = []
        for slot, seen in self.links.inputs.items():
            if seen and all(s is not None and s.module in twins for s in seen):
                layers = tuple(dict.fromkeys(twins[s.module] for s in seen))
                found.append((slot, FusedActivation(slot.module, layers)))
        return found


def _is_stateless(module: nn.Module) -> bool:
    if isinstance(module, (nn.Identity, torch.jit.ScriptModule)) or is_hooked(module):
        return False
    return not (module._parameters or module._buffers or module._modules)


def kind_of_activation(module: nn.Module, dtype: torch.dtype) -> str | None:
    """The fused activation that gives the same values, None when there is none.

    Compared in float64 on [-12, 12] and far outside, to a few roundings of `dtype` (of float32 for
    anything narrower, which could not tell the two forms of GELU apart).
    """
    size = torch.logspace(-6, 30, 109, dtype=torch.float64)
    x = torch.cat([torch.linspace(-12, 12, 4801, dtype=torch.float64), size, -size])
    try:
        watch, twin = Watch(), shallow_copy(module)
        watch.around([type(module)])
        watch.over(twin, module)
        with torch.no_grad():
            y = twin(x.clone())
        watch.finish()
    except Exception:  # it takes another thing than one tensor, or does more than compute
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for kind in FUSABLE:
        if bool(((y - activate(x, kind, "probe")).abs() <= 8 * unit * x.abs()).all()):
            return kind
    return None


def check_agreement(want, got, dtype: torch.dtype) -> float | None:
    """Largest difference of two outputs relative to the largest value, None without any tensor.

    Raises:
        ValueError: the difference is no rounding.
    """
    pair = [
        {path: t for path, t in tensors_of(out).items() if t.is_floating_point()}
        for out in (want, got)
    ]
    if not pair[0] and not pair[1]:
        return None
    _, error = output_error(*pair, "convert_to_sparse")
    if not error <= AGREEMENT.get(dtype, 0.2):
        raise ValueError(f"fused, its outputs differ by {error:.2g} of the largest value")
    return error


def run_once(model: nn.Module, inputs, seeded: bool):
    """Outputs of a run. `seeded`: the random numbers it draws are the same each time."""
    with undisturbed(model), torch.inference_mode():
        if seeded:
            torch.manual_seed(0)
        return forward_call(model, inputs)()
