"""Lottery tickets: back to an early step with the masks of a late one."""

import copy

import torch
from torch import nn

from .methods.random import Random
from .pruner import Pruner

CONTROLS = ("reinit", "random_mask")


class LotteryTicket:
    """Remembers a step of a training, and rewinds to it with the masks found since.

    Frankle & Carbin 2019, arXiv:1803.03635; rewinding to a step k > 0: arXiv:1903.01611,
    arXiv:1912.05671. What is remembered: parameters and buffers (BatchNorm statistics), the
    optimizers' states, the learning-rate schedule, and the random state that decides the data
    order. A warm-up, without which deep networks hold no tickets (1803.03635, section 4), is part
    of the schedule and begins anew.

    ```python
    schedule = sk.schedules.Iterative(0.9, rounds=5, every=1000)
    pruner = sk.Pruner(model, optimizer, "magnitude", schedule=schedule)
    for step in range(6 * 1000):
        train_step()
        if step == k:
            ticket = sk.LotteryTicket(pruner, scheduler)
        if pruner.step():
            ticket.rewind()
    ```

    Make it right after `optimizer.step()` and `scheduler.step()`, or before training for k = 0.
    """

    def __init__(self, pruner: Pruner, scheduler=None, generator: torch.Generator | None = None):
        """Copy the present state.

        Args:
            pruner: Holds model and optimizers.
            scheduler: A `torch.optim.lr_scheduler`, if there is one.
            generator: The DataLoader's, if it has its own; torch's global one counts in any case.

        Raises:
            TypeError: `pruner` is none.
        """
        if not isinstance(pruner, Pruner):
            got = type(pruner).__name__
            raise TypeError(f"LotteryTicket: expected a Pruner, got {got}")
        self.pruner, self.scheduler, self.generator = pruner, scheduler, generator
        self._weights = copy.deepcopy(pruner.model.state_dict())
        self._optimizers = [copy.deepcopy(each.state_dict()) for each in pruner.optimizers]
        self._scheduler = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
        self._is_dense = all(bool(mask.all()) for mask in pruner.masks.values())
        self._random = torch.get_rng_state()
        self._data_order = None if generator is None else generator.get_state()

    def rewind(self, weights: bool = True, control: str | None = None, seed: int = 0) -> None:
        """Go back to the remembered step, with the pruner's present masks.

        Args:
            weights: False leaves weights, buffers and momentum as they are: learning-rate rewinding
                (Renda et al. 2020, arXiv:2003.02389).
            control: A control experiment: `"reinit"` draws new weights for the whole model,
                `"random_mask"` replaces the masks by random ones of the same pattern and as many
                weights in every layer.
            seed: Seed of the control.

        Raises:
            ValueError: Unknown control, or one together with `weights=False`; `"random_mask"` for a
                ticket taken after pruning, which lacks the weights of other masks.
            TypeError: `"reinit"`, and a module has parameters but no `reset_parameters()`.
        """
        if control is not None and (control not in CONTROLS or not weights):
            known = ", ".join(CONTROLS)
            got = f"{control!r}, weights={weights}"
            raise ValueError(
                f"LotteryTicket.rewind: expected control one of {known}, with weights; got {got}"
            )
        if control == "random_mask" and not self._is_dense:
            raise ValueError(
                "LotteryTicket.rewind: expected a ticket taken before any pruning for control "
                "'random_mask', got one of a pruned model"
            )
        modules = _resettable(self.pruner.model) if control == "reinit" else []
        masks = self._random_masks(seed) if control == "random_mask" else self.pruner.masks
        self._load(weights)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for module in modules:
                module.reset_parameters()
        # Takes what was remembered for dropped weights out of weights and momentum.
        self.pruner.set_masks(masks)

    def _load(self, weights: bool) -> None:
        if weights:
            self.pruner.model.load_state_dict(self._weights)
        for optimizer, saved in zip(self.pruner.optimizers, self._optimizers):
            state = copy.deepcopy(saved)
            if not weights:
                state = {**optimizer.state_dict(), "param_groups": state["param_groups"]}
            optimizer.load_state_dict(state)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(self._scheduler))
        torch.set_rng_state(self._random)
        if self.generator is not None:
            self.generator.set_state(self._data_order)

    def _random_masks(self, seed: int) -> dict[str, torch.Tensor]:
        draw, masks = Random(seed=seed), {}
        for layer, mask in zip(self.pruner.layers, self.pruner.masks.values()):
            kept = int(mask.count_nonzero())
            drawn = draw.mask(layer, self.pruner.pattern, kept, None, False)
            masks[layer.name] = layer.oriented(drawn) if kept < mask.numel() else mask.clone()
        return masks


def _resettable(model: nn.Module) -> list[nn.Module]:
    modules = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    for module in modules:
        if not hasattr(module, "reset_parameters"):
            raise TypeError(
                "LotteryTicket.rewind: expected modules with reset_parameters() for control "
                f"'reinit', got {type(module).__name__} without"
            )
    return modules
