"""Pruning while training: `Pruner`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..patterns import NM, Pattern
from . import sync
from .average import mask_average
from .collapse import warn_of_collapse
from .guard import Guard
from .job import DEFAULT_SPARSITY, Job, prepare
from .methods.base import Method, zero_out
from .old_zeros import alive_in, check_keep, share_of_zeros, warn_of_start
from .optimizers import check_all_held, listed
from .report import PruneReport, make_report
from .resume import FORMAT, Undo, check_state
from .schedules import Schedule, final_sparsity
from .slots import Slot
from .targets import Layer, parameters_of, restored_on_error, unwrapped


class Pruner:
    """Prunes a model while it trains, and keeps what is pruned at zero.

    ```python
    pruner = sk.Pruner(model, optimizer, "rigl", sparsity=0.9, pattern="block:16x16")
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
        pruner.step()
    pruner.finalize()
    ```

    The weights stay plain parameters under their own names. Masks lie beside them as boolean
    tensors `weight_mask` (no buffers, and not in the model's state_dict) and change in place.
    Gradients of dropped weights are set to zero before they reach anyone, and dropped weights after
    every `optimizer.step()`, so neither momentum nor weight decay revives them; the optimizer's
    state at dropped and at regrown weights is cleared. Steps that the optimizer skips (GradScaler,
    accelerate while it accumulates gradients) do not count. A step of an optimizer that was not
    given and holds a pruned weight is an error. Everything is deterministic, and identical on all
    ranks of a distributed run: scores and gradients are averaged over them, data may be a shard on
    each, and every rank must make the Pruner and step it. Every rank must hold whole weights (DDP,
    not FSDP).

    To resume, build model, optimizer and Pruner as before and load the three state_dicts, in any
    order: training goes on bit by bit as if it had never stopped.

    Zeros that are there when the schedule begins to prune stay, in every method but rigl, set and
    srste, which take weights back by design. Until then weights train freely: a warning tells what
    a schedule that starts below the present sparsity undoes. `method="keep"` keeps exactly the
    zeros that are there.

    An average of the model (`torch.optim.swa_utils.AveragedModel` and the like, made before or
    after the Pruner) mixes weights of all masks so far; `apply_masks(average)` gives it today's.

    Attributes:
        model: The model; the one inside, if it came in a `DistributedDataParallel`.
        optimizers: Its optimizers, as they were given.
        schedule: The schedule.
        steps: Optimizer steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        method: str = "magnitude",
        sparsity: float | None = None,
        pattern: str | Pattern = "unstructured",
        scope: str | Mapping[str, float] | None = None,
        schedule: Schedule | None = None,
        data: Iterable | None = None,
        loss_fn=None,
        targets: type | Sequence[type] = (nn.Linear, nn.Conv2d),
        ignore: str | type | Iterable[str | type] = (),
        **method_options,
    ):
        """Check everything, and prune at once if the schedule has an update at step 0.

        Arguments are those of `prune`, and:

        Args:
            model: Model on the device it trains on.
            optimizer: The optimizer of the model or a list of all of them, bare or in wrappers such
                as accelerate's. Together they hold the weights of all layers that train.
            method: Those of `prune`, and `"rigl"`, `"set"`, `"movement"`, `"soft_movement"`,
                `"srste"` and `"keep"`.
            sparsity: That of the schedule's end; default the schedule's, the pattern's, or 0.9.
            pattern: As for `prune`. N:M under a gradual schedule passes through (N + k):M.
            scope: As for `prune`. The sparsities of a dict grow in step with the schedule.
            schedule: A `sparsekern.schedules` object; default the method's own: one shot at step 0,
                every 100 steps for rigl and set, every step for srste.
            data: As for `prune`, read once and held in memory.
            loss_fn: As for `prune`.
            targets: As for `prune`.
            ignore: As for `prune`.
            **method_options: Fields of the method's class.

        Raises:
            ValueError: As for `prune`; sparsity and schedule that disagree; layers that train and
                that no optimizer holds; a model that has a Pruner already; anything that
                contradicts method "keep".
            TypeError: An argument of the wrong type, or an unknown method option.
        """
        self.optimizers = listed(optimizer)
        final = final_sparsity(sparsity, schedule)
        self.model, self.steps, self._name = unwrapped(model), 0, method
        if method == "keep":
            final = None
        common = (pattern, scope, data, loss_fn, targets, ignore, method_options)
        self._job, self._skipped = prepare(
            model, method, final, *common, training=True, distributed=True
        )
        if sparsity is None and isinstance(self._job.scope, Mapping):
            self._job = replace(self._job, sparsity=None)
        if self._job.method.keeps:
            check_keep(self._job.layers, self._job.pattern, sparsity, schedule, scope)
        self.schedule = schedule or self._default_schedule()
        self._slots = [Slot(la, parameters_of(self.model, la)) for la in self._job.layers]
        self._check_free()
        warn_of_start(self.model, self._job.layers, self._job.method, self.schedule)
        self._finished = self._pruned = False
        self._undo: Undo | None = None
        self._guard = Guard(
            self._job.method, self._method_now, self._slots, self._watches, self._is_over
        )
        self._guard.attach(self.model, self.optimizers)
        try:
            self._begin()
        except BaseException:
            self._release()
            raise

    def step(self) -> bool:
        """Count an optimizer step and, where the schedule says so, choose the masks anew.

        Call it after `optimizer.step()`.

        Returns:
            True if the masks were chosen anew.

        Raises:
            RuntimeError: The pruner is finalized.
            ValueError: Scores that are NaN, or gradients that a method needs and that are missing;
                weights and masks stay as they were.
        """
        self._check_alive("step")
        if not self._guard.stepped:
            return False
        self._guard.stepped, self._undo = False, None
        self.steps += 1
        if not self.schedule.is_update(self.steps):
            return False
        self._update()
        return True

    def report(self) -> PruneReport:
        """Count the zeros that are in the weights now."""
        job = self._job
        where = self.layers, self._skipped, self.model, job.task.notes
        return make_report(self._name, job.pattern, job.scope, *where)

    @property
    def layers(self) -> list[Layer]:
        """The layers, in module order."""
        return [slot.layer for slot in self._slots]

    @property
    def pattern(self) -> Pattern:
        """The pattern at the end of the schedule."""
        return self._job.pattern

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by layer name, True = kept, in the layout of the parameters."""
        self._check_alive("masks")
        return {slot.layer.name: slot.parameter_mask for slot in self._slots}

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Replace masks by hand, and forget the values of dropped weights.

        Args:
            masks: Boolean masks by layer name, in the layout of the parameters.

        Raises:
            ValueError: A name or shape that does not fit, or not boolean; nothing changes.
        """
        self._check_alive("set_masks")
        slots = {slot.layer.name: slot for slot in self._slots}
        for name, mask in masks.items():
            if name not in slots:
                raise ValueError(f"Pruner.set_masks: expected names of {list(slots)}, got {name!r}")
            slots[name].check(mask)
        for name, mask in masks.items():
            self._install(slots[name], slots[name].layer.oriented(mask))
        self.forget()

    def forget(self) -> None:
        """Set dropped weights to zero and forget the values kept aside for them."""
        for slot in self._slots:
            if slot.held is not None:
                slot.held.zero_()
            zero_out(slot.layer, slot.mask)

    def apply_masks(self, model: nn.Module) -> None:
        """Give an average of the model today's zeros.

        Args:
            model: A model with the same layers, as `AveragedModel` makes it, bare or in the wrapper
                that averages. Its kept weights stay as they are; what is 0 here is set to 0.

        Raises:
            TypeError: No module.
            ValueError: A layer that is not there, or of another shape; nothing changes.
        """
        mask_average(model, self.layers, self._job.method)

    def state_dict(self) -> dict:
        """Give everything needed to resume: plain numbers, strings and tensors, masks as bits."""
        self._check_alive("state_dict")
        generator = getattr(self._job.method, "generator", None)
        return {
            "format": FORMAT,
            "method": self._name,
            "pattern": str(self._job.pattern),
            "steps": self.steps,
            "stepped": self._guard.stepped,
            "pruned": self._pruned,
            "generator": None if generator is None else generator.get_state(),
            "layers": {slot.layer.name: slot.state_dict() for slot in self._slots},
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Take up a saved state; the schedule is the one this pruner was made with.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: Another method, pattern or set of layers, or masks that do not fit; nothing
                changes.
        """
        self._check_alive("load_state_dict")
        check_state(state, self._name, self._job.pattern, self._slots)
        found = [slot.read(state["layers"][slot.layer.name]) for slot in self._slots]
        if self._undo is not None:
            self._undo.run()
        self._undo = None
        for slot, (mask, held, seen) in zip(self._slots, found):
            slot.mask.copy_(mask)
            slot.held, slot.seen = held, seen
            zero_out(slot.layer, mask)
        self.steps, self._guard.stepped = state["steps"], state["stepped"]
        self._pruned = state["pruned"]
        if state["generator"] is not None:
            self._job.method.generator.set_state(state["generator"])

    def finalize(self) -> PruneReport:
        """Stop: remove hooks and masks. The zeros are in the weights, ready for conversion.

        A mask stays beside a weight of which kept values are 0 by accident: `convert_to_sparse`
        finds the pattern by it.

        Returns:
            The report.
        """
        self._check_alive("finalize")
        self.forget()
        self._release()
        self._finished = True
        return self.report()

    def _release(self) -> None:
        """Take everything off the layers that is not theirs."""
        self._guard.detach()
        for layer in self.layers:
            self._job.method.installed(layer, None)

    def _default_schedule(self) -> Schedule:
        job, sparsity = self._job, self._job.sparsity
        if job.method.keeps:
            return job.method.schedule(share_of_zeros(job.layers))
        if sparsity is None:
            sparsity = job.pattern.sparsity if isinstance(job.pattern, NM) else DEFAULT_SPARSITY
        return job.method.schedule(sparsity)

    def _check_free(self) -> None:
        check_all_held(self.optimizers, self._slots)
        for slot in self._slots:
            if slot.is_taken:
                raise ValueError(
                    f"Pruner: expected a model without another pruner, got one on layer "
                    f"{slot.layer.name!r}; finalize that first"
                )

    def _check_alive(self, what: str) -> None:
        if self._finished:
            raise RuntimeError(f"Pruner.{what}: expected a pruner in use, got one finalized")

    def _begin(self) -> None:
        """Make the update of step 0, and remember how to take it back for `load_state_dict`."""
        if not self.schedule.is_update(0):
            return
        undo = Undo(self._slots, self._guard.optimizers)
        self._update()
        undo.updated()
        self._undo = undo

    def _is_over(self) -> bool:
        last = self.schedule.last
        return last is not None and self.steps >= last

    def _method_now(self) -> Method:
        return self._job.method.at(self.steps, self.schedule)

    def _watches(self) -> bool:
        watches = self._job.method.watches
        if watches == "updates":
            return self.schedule.is_update(self.steps + 1)
        return watches == "steps" and not self._is_over()

    @torch.no_grad()
    def _update(self) -> None:
        """Choose the masks of this step; on failure weights and masks stay as they were."""
        sparsity, method = self.schedule.sparsity(self.steps), self._job.method
        with restored_on_error(self.layers), self._guard.paused():
            if method.returning:
                for slot in self._slots:
                    slot.put_back()
            dense = [
                slot.layer.weight.clone() if method.returning else None for slot in self._slots
            ]
            masks = self._choose(sparsity)
        if not method.keeps:
            warn_of_collapse("Pruner", self.layers, masks, self._job.scope, self._job.collapsed)
        for slot, mask, values in zip(self._slots, masks, dense):
            self._install(slot, mask)
            if method.returning and not self._is_over():
                slot.held = values.masked_fill(mask, 0)
            else:
                slot.held = None
            if method.watches == "updates" or self._is_over():
                slot.seen = None
            zero_out(slot.layer, mask)
            method.installed(slot.layer, self._pattern_at(sparsity) if sparsity else None)
        self._pruned = self._pruned or sparsity > 0

    def _choose(self, sparsity: float) -> list[Tensor]:
        if sparsity == 0:
            return [torch.ones_like(slot.mask) for slot in self._slots]
        if self._job.method.keeps:
            masks = [slot.layer.weight != 0 for slot in self._slots]
            self._job.task.agree(masks)
            return masks
        job, pattern = self._job_at(sparsity), self._pattern_at(sparsity)
        if pattern is None:
            whole = [(la, torch.ones_like(la.weight, dtype=torch.bool)) for la in job.layers]
            return [mask if la.alive is None else la.alive for la, mask in whole]
        return replace(job, pattern=pattern).run()

    def _job_at(self, sparsity: float) -> Job:
        """The job at a sparsity on the way to the final one."""
        job, share = self._job, sparsity / self.schedule.final if self.schedule.final else 0.0
        if isinstance(job.scope, Mapping):
            scope = {name: value * share for name, value in job.scope.items()}
            rest = None if job.sparsity is None else job.sparsity * share
            job = replace(job, scope=scope, sparsity=rest)
        else:
            job = replace(job, sparsity=sparsity)
        layers = [
            replace(s.layer, alive=alive_in(s, job.method, self._pruned)) for s in self._slots
        ]
        method = self._method_now()
        seen = tuple(slot.seen for slot in self._slots) if method.watches else None
        if seen is not None:
            sync.average(tensor for tensor in seen if tensor is not None)
        return replace(job, layers=layers, method=method, totals=seen)

    def _pattern_at(self, sparsity: float) -> Pattern | None:
        """N:M on its way: as many of M as the schedule wants; None while that is all of them."""
        pattern = self._job.pattern
        if not isinstance(pattern, NM):
            return pattern
        # A hair less, so that 2 of 4 at sparsity 0.5 does not round up to 3.
        kept = math.ceil((1 - sparsity) * pattern.m - 1e-6)
        return None if kept >= pattern.m else replace(pattern, n=max(kept, pattern.n))

    def _install(self, slot: Slot, mask: Tensor) -> None:
        """Change a mask in place; the optimizer forgets what it knew of changed weights."""
        mask = mask.to(slot.mask.device)
        if not self._guard.trains_dropped:
            # What was trained behind the mask knows its momentum; what was still does not.
            grown = mask & ~slot.mask if not self._job.method.trains_dropped else False
            for optimizer in self._guard.optimizers:
                slot.clear_state(optimizer, ~mask | grown)
        slot.mask.copy_(mask)
