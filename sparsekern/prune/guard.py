"""Keeping dropped weights at zero through the steps of an optimizer, whatever they remember."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .bits import drop_
from .methods.base import Method, zero_out
from .slots import MASK, Slot


class Guard:
    """The hooks of a Pruner.

    Attributes:
        stepped: The optimizer made a step that was not counted yet.
        method: Says what it wants to see, and whether dropped weights are trained.
        now: Gives the method as it is at the present step, for `observe`.
        slots: The layers.
        watches: Says whether the method sees the gradients of the coming step.
        is_over: Says whether the schedule has made its last update.
    """

    def __init__(
        self,
        method: Method,
        now: Callable[[], Method],
        slots: Sequence[Slot],
        watches: Callable[[], bool],
        is_over: Callable[[], bool],
    ):
        self.method, self.now, self.slots = method, now, slots
        self.watches, self.is_over = watches, is_over
        self.stepped = self._paused = False

    @property
    def trains_dropped(self) -> bool:
        """Say whether values of dropped weights go on changing."""
        return self.method.trains_dropped and not self.is_over()

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put masks beside the weights and hooks on gradients and optimizer."""
        self.model = model
        self.handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        for slot in self.slots:
            slot.attach()
            for parameter in slot.parameters:
                if parameter.requires_grad:
                    self.handles.append(parameter.register_hook(self._gradient_hook(slot)))

    def detach(self) -> None:
        """Take masks and hooks away."""
        for handle in self.handles:
            handle.remove()
        for slot in self.slots:
            slot.detach()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave gradients alone while scores are measured."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _gradient_hook(self, slot: Slot) -> Callable[[Tensor], Tensor | None]:
        # Here and not only before the step: clipping must not see gradients of dropped weights.
        def hook(gradient):
            if self._paused or self.watches() or self.trains_dropped:
                return None
            return drop_(gradient.clone(), getattr(slot.layer.module, MASK))

        return hook

    @torch.no_grad()
    def _before_step(self, optimizer, args, kwargs) -> None:
        if _is_skipped(optimizer):
            return
        scale = _scale_of_gradients(optimizer)
        for slot in self.slots:
            gradients = [p.grad for p in slot.parameters if p.grad is not None]
            if gradients and self.watches():
                gradient = sum(gradients[1:], gradients[0])
                self._observe(slot, gradient if scale == 1 else gradient / scale)
            if not self.trains_dropped:
                for gradient in gradients:
                    drop_(gradient, getattr(slot.layer.module, MASK))
            elif slot.held is not None:
                slot.put_back()
                pull = slot.layer.oriented(slot.held)
                for gradient in gradients:
                    gradient.add_(pull.to(gradient), alpha=self.method.decay * scale)

    def _observe(self, slot: Slot, gradient: Tensor) -> None:
        slot.put_back()
        slot.seen = self.now().observe(slot.layer, slot.layer.oriented(gradient), slot.seen)
        zero_out(slot.layer, slot.mask)

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        if _is_skipped(optimizer):
            return
        self.stepped = True
        for slot in self.slots:
            if self.trains_dropped:
                slot.put_aside()
            else:
                zero_out(slot.layer, slot.mask)
            self.method.settle(self.model, slot.layer, slot.mask)


def _is_skipped(optimizer) -> bool:
    """Say whether a fused optimizer will find Inf or NaN and do nothing (GradScaler tells it)."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)


def _scale_of_gradients(optimizer) -> float:
    """Factor that is still in the gradients: fused optimizers take it out in their own kernel."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)
