"""Keeping dropped weights at zero through the steps of an optimizer, whatever they remember."""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .bits import drop_
from .methods.base import Method, zero_out
from .optimizers import chain, held_by
from .slots import Slot


class Guard:
    """The hooks of a Pruner.

    Attributes:
        optimizers: The torch optimizers that are guarded, wrappers and what they wrap alike.
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
        self.optimizers: list[Optimizer] = []
        self._outermost: Optimizer | None = None  # of those in the middle of a step
        self._frame: FrameType | None = None  # the call of that step, which may have failed since
        self._hooked: set[int] = set()

    def __reduce_ex__(self, protocol):
        """Refuse to be copied or pickled: the copy of a Pruner would hang on nothing."""
        raise TypeError(
            "Pruner: expected no copy and no pickle of a Pruner, which would keep no zeros; copy "
            "or save the model and the pruner's state_dict(), and make a new Pruner for the copy"
        )

    @property
    def trains_dropped(self) -> bool:
        """Say whether values of dropped weights go on changing."""
        return self.method.trains_dropped and not self.is_over()

    def attach(self, model: nn.Module, given: Sequence) -> None:
        """Put masks beside the weights and hooks on gradients and optimizers."""
        self.model, self.given, self.handles = model, given, []
        self._hook_optimizers()
        self._watch_others()
        for slot in self.slots:
            slot.attach()
            for parameter in slot.parameters:
                if parameter.requires_grad:
                    self.handles.append(parameter.register_hook(self._gradient_hook(slot)))

    def _hook_optimizers(self) -> None:
        for optimizer in (real for each in self.given for real in chain(each)):
            # Lightning's wrapper shares the hooks of what it wraps; they shall not run twice.
            if id(optimizer._optimizer_step_pre_hooks) not in self._hooked:
                self._hooked.add(id(optimizer._optimizer_step_pre_hooks))
                self.optimizers.append(optimizer)
                self.handles += [
                    optimizer.register_step_pre_hook(self._enter),
                    optimizer.register_step_post_hook(self._leave),
                ]

    def _watch_others(self) -> None:
        """See the steps of all optimizers of the process, for one that was not given."""
        me = weakref.ref(self)

        def before_any_step(optimizer, args, kwargs):
            guard = me()
            if guard is not None:
                guard._refuse_unknown(optimizer)

        handle = register_optimizer_step_pre_hook(before_any_step)
        self.handles.append(handle)
        weakref.finalize(self, handle.remove)

    def _refuse_unknown(self, optimizer: Optimizer) -> None:
        if id(optimizer._optimizer_step_pre_hooks) in self._hooked:
            return
        held = held_by(optimizer, self.slots)
        if not held:
            return
        self._hook_optimizers()  # a wrapper may have made what it wraps anew
        if id(optimizer._optimizer_step_pre_hooks) not in self._hooked:
            names = [slot.layer.name for slot in held]
            raise RuntimeError(
                f"Pruner: expected steps of the optimizers it was given, got one of another "
                f"{type(optimizer).__name__} that holds the weights of {names} and would revive "
                "what is dropped; finalize() the pruner if pruning is over, or make a new one "
                "with that optimizer and load the old one's state_dict()"
            )

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
            return drop_(gradient.clone(), slot.parameter_mask)

        return hook

    def _enter(self, optimizer, args, kwargs) -> None:
        step = sys._getframe(1)
        if not _is_skipped(optimizer) and not self._is_inside(optimizer, step):
            self._outermost, self._frame = optimizer, step
            self._before_step(optimizer)

    def _leave(self, optimizer, args, kwargs) -> None:
        if not _is_skipped(optimizer) and not self._is_inside(optimizer, sys._getframe(1)):
            self._outermost, self._frame, self.stepped = None, None, True
            self._after_step(optimizer)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        scale = _scale_of_gradients(optimizer)
        for slot in held_by(optimizer, self.slots):
            gradients = [p.grad for p in slot.parameters if p.grad is not None]
            if gradients and self.watches():
                gradient = sum(gradients[1:], gradients[0])
                self._observe(slot, gradient if scale == 1 else gradient / scale)
            if not self.trains_dropped:
                for gradient in gradients:
                    drop_(gradient, slot.parameter_mask)
            elif slot.held is not None:
                slot.put_back()
                pull = slot.layer.oriented(slot.held)
                for gradient in gradients:
                    gradient.add_(pull.to(gradient), alpha=self.method.decay * scale)

    def _is_inside(self, optimizer: Optimizer, step: FrameType) -> bool:
        """Say whether a step is part of one that a wrapper, or a class derived from its own, makes.

        Args:
            optimizer: Whose step it is.
            step: The frame that called the hook.
        """
        if self._outermost is None or all(optimizer is not o for o in chain(self._outermost)):
            return False
        while (step := step.f_back) is not None:
            if step is self._frame:
                return True
        return False

    def _observe(self, slot: Slot, gradient: Tensor) -> None:
        slot.put_back()
        slot.seen = self.now().observe(slot.layer, slot.layer.oriented(gradient), slot.seen)
        zero_out(slot.layer, slot.mask)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer) -> None:
        for slot in held_by(optimizer, self.slots):
            if self.trains_dropped:
                slot.put_aside()
            else:
                zero_out(slot.layer, slot.mask)
        for slot in self.slots:  # a BatchNorm may be in another optimizer than its layer
            self.method.settle(self.model, slot.layer, slot.mask)


def _is_skipped(optimizer) -> bool:
    """Say whether a fused optimizer will find Inf or NaN and do nothing (GradScaler tells it)."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)


def _scale_of_gradients(optimizer) -> float:
    """Factor that is still in the gradients: fused optimizers take it out in their own kernel."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)
