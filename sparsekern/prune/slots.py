"""What the Pruner holds for each layer: its mask, and values and observations kept aside."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .bits import pack, unpack
from .methods.base import zero_out
from .targets import Layer

MASK = "weight_mask"
SETTLED = "weight_mask_settled"  # beside a mask that no Pruner changes any more
# Modules under a Pruner. Their mask does not tell: a deepcopy has it, too.
_taken: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def mask_beside(module: nn.Module) -> Tensor | None:
    """Mask that a Pruner put beside a weight, in its layout; None if there is none that fits.

    A mask no longer fits once weights outside of it are not 0. A copy of a model under a Pruner (an
    average) may have one from before the pruning: if it drops nothing, or keeps more zeros than
    weights, it tells nothing.
    """
    mask, weight = getattr(module, MASK, None), module._parameters.get("weight")
    if not isinstance(mask, Tensor) or weight is None:
        return None
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        return None
    mask, nonzero = mask.to(weight.device), weight.detach() != 0
    kept, used = int(mask.count_nonzero()), int(nonzero.count_nonzero())
    settled = module in _taken or vars(module).get(SETTLED)
    if not settled and (kept == mask.numel() or kept > 2 * used):
        return None
    return None if bool((nonzero & ~mask).any()) else mask


def put_beside(module: nn.Module, mask: Tensor) -> None:
    """Leave a mask beside a weight whose kept values are 0 by accident, for a conversion to find.

    A weight that was grown, or whose inputs are always 0, may be kept and be 0 still. Where the
    zeros tell the mask, there is none.

    Args:
        module: The layer.
        mask: Boolean, in the layout of its weight, True = kept.
    """
    vars(module).pop(MASK, None)
    vars(module).pop(SETTLED, None)
    if not torch.equal(mask, module.weight != 0):
        vars(module).update({MASK: mask, SETTLED: True})


@dataclass
class Slot:
    """One layer under a Pruner.

    Attributes:
        layer: The layer.
        parameters: Its weight, and other parameters over the same memory.
        held: Values of the dropped weights, `(out, in, *kernel)`, 0 where kept; None if not needed.
        seen: What the method observed, `(..., out, in, *kernel)`, or None.
    """

    layer: Layer
    parameters: list[nn.Parameter]
    held: Tensor | None = None
    seen: Tensor | None = None

    def check(self, mask: Tensor) -> None:
        """Refuse a mask that is not boolean or not of the parameter's shape."""
        wanted = self.layer.module.weight.shape
        if mask.dtype != torch.bool or mask.shape != wanted:
            raise ValueError(
                f"Pruner.set_masks: expected a boolean mask of shape {tuple(wanted)} for layer "
                f"{self.layer.name!r}, got {mask.dtype} {tuple(mask.shape)}"
            )

    @property
    def is_taken(self) -> bool:
        """Say whether another Pruner is at work on the layer."""
        return self.layer.module in _taken

    def attach(self) -> None:
        """Put a mask of ones beside the weight, in its layout.

        A plain attribute: buffers are averaged by an average of the model (`AveragedModel`), and
        must be as many as when that was made.
        """
        _taken.add(self.layer.module)
        mask = torch.ones_like(self.layer.module.weight, dtype=torch.bool)
        vars(self.layer.module)[MASK] = mask
        vars(self.layer.module).pop(SETTLED, None)

    def detach(self) -> None:
        """Forget what is kept aside, and take the mask away unless the zeros do not tell it."""
        put_beside(self.layer.module, self.parameter_mask)
        _taken.discard(self.layer.module)
        self.held = self.seen = None

    @property
    def parameter_mask(self) -> Tensor:
        """The mask in the layout of the parameter, on its device."""
        module = self.layer.module
        mask = vars(module)[MASK]
        if mask.device != module.weight.device:
            mask = vars(module)[MASK] = mask.to(module.weight.device)
        return mask

    @property
    def mask(self) -> Tensor:
        """The mask, `(out, in, *kernel)`, sharing memory with the one beside the weight."""
        return self.layer.oriented(self.parameter_mask)

    def put_back(self) -> None:
        """Give dropped weights the values that are kept aside."""
        if self.held is not None:
            weight = self.layer.weight
            weight.copy_(torch.where(self.mask, weight, self.held.to(weight)))

    def put_aside(self) -> None:
        """Keep the values of dropped weights, and set the weights to zero."""
        self.held = self.layer.weight.masked_fill(self.mask, 0)
        zero_out(self.layer, self.mask)

    def clear_state(self, optimizer, cells: Tensor) -> None:
        """Set the optimizer's state (momentum and the like) to zero at some weights."""
        cells = self.layer.oriented(cells)
        for value in self.state_in(optimizer):
            value.masked_fill_(cells.to(value.device), 0)

    def state_in(self, optimizer) -> list[Tensor]:
        """The tensors in the optimizer's state that hold a number for each weight."""
        return [
            value
            for parameter in self.parameters
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        ]

    def state_dict(self) -> dict:
        """Give the state as tensors, the mask packed to bits and held values only where dropped."""
        mask = self.mask
        state = {"shape": tuple(mask.shape), "mask": pack(mask)}
        if self.held is not None:
            state["held"] = self.held[~mask].clone()
        if self.seen is not None:
            state["seen"] = self.seen.clone()
        return state

    def read(self, state: dict) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Check a saved state and give mask, held and seen, without changing anything."""
        where = f"Pruner.load_state_dict: layer {self.layer.name!r}"
        weight, held, seen = self.layer.weight, state.get("held"), state.get("seen")
        if tuple(state["shape"]) != tuple(weight.shape):
            raise ValueError(
                f"{where}: expected a mask of shape {tuple(weight.shape)}, got "
                f"{tuple(state['shape'])}"
            )
        try:
            mask = unpack(state["mask"], weight.shape).to(weight.device)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        dropped = mask.numel() - int(mask.count_nonzero())
        if held is not None and held.shape != (dropped,):
            raise ValueError(f"{where}: expected {dropped} held values, got {tuple(held.shape)}")
        if seen is not None and seen.shape[-weight.ndim :] != weight.shape:
            raise ValueError(f"{where}: expected seen like the weight, got {tuple(seen.shape)}")
        if held is not None:
            values = torch.zeros_like(weight)
            values[~mask] = held.to(values)
            held = values
        return mask, held, None if seen is None else seen.to(weight.device).clone()
