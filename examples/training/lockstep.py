"""One network trained dense, masked and sparse: the same first weights, the same batches."""

import copy
import math
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from wide import dense_forms

import sparsekern as sk
from sparsekern.measure import count_operations, interleaved, modelled_energy
from sparsekern.measure.energy_model import LayerCount, OperationCount
from sparsekern.measure.memory import extra_buffer_bytes, peak_forward_bytes, weight_bytes
from sparsekern.measure.timer import quantiles

CHANNELS_LAST = "channels_last"
# Bytes per parameter and step. SGD with momentum reads weight, gradient and momentum and writes
# weight and momentum; a mask (1 byte) is applied to the gradient (twice) and to the weight.
OPTIMIZER_BYTES, MASK_BYTES = 5 * 4, 3 * (1 + 2 * 4)


@dataclass
class Side:
    """A network in training, and how long its steps took.

    Attributes:
        model: The network.
        options: `lr`, `momentum`, `steps`, and `warmup`, the share of the steps over which the
            learning rate rises; then it falls to zero by a cosine.
        last: Whether it takes images in channels_last.
        form: How it is computed.
        pruner: Keeps the masks, None without any.
        masked: Whether all layers have masks, not only those a conversion left dense.
        made_s: Seconds of pruning and conversion.
        wall: Seconds of each step.
        cpu: Processor seconds of each step, all threads together.
    """

    model: nn.Module
    options: Namespace
    last: bool = False
    form: str = "plain"
    pruner: sk.Pruner | None = None
    masked: bool = False
    made_s: float = 0.0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def __post_init__(self):
        """Make the optimizer, once the parameters are those that are trained."""
        options = self.options
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), options.lr, options.momentum, fused=True
        )
        rate = partial(_rate, steps=options.steps, rising=int(options.warmup * options.steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Make one step; returns the loss."""
        if self.last:
            images = images.contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        if self.pruner is not None:
            self.pruner.step()
        return loss.item()

    def timed_step(self, images: Tensor, labels: Tensor) -> float:
        """As `step`, and note its time."""
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.step(images, labels)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return loss

    def costs(self, images: Tensor, labels: Tensor) -> dict:
        """What a step costs; makes two more of them, so ask when the training is over."""
        held = weight_bytes(self.model) + extra_buffer_bytes(self.model)
        momentum = sum(
            value.numel() * value.element_size()
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        self.optimizer.zero_grad()
        step = peak_forward_bytes(lambda: self.step(images, labels), images.device)
        return {
            "form": self.form,
            "steps": len(self.wall),
            "made_s": self.made_s,
            "wall_s": sum(self.wall),
            "cpu_s": sum(self.cpu),
            "wall_ms": [1e3 * t for t in quantiles(self.wall)],  # p10, median, p90
            "cpu_ms": [1e3 * t for t in quantiles(self.cpu)],
            "held_bytes": held + momentum,
            "peak_bytes": held + momentum + step,
            "joules": step_energy(self.model, images, self.masked),
            "energy": "modelled",
        }


def _rate(step: int, steps: int, rising: int) -> float:
    """Share of the learning rate at a step: up in a line, down by a cosine."""
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def step_energy(model: nn.Module, images: Tensor, masked: bool) -> float | None:
    """Modelled joules of a training step, see `sparsekern.measure.formula_text`.

    A layer is charged as often as it multiplies: output, gradient of the weights and, but for the
    first layer, gradient of the input. The optimizer is charged two multiply-adds and its traffic.
    """
    layers = count_operations(model, images).layers
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moved = weights * (OPTIMIZER_BYTES + masked * MASK_BYTES)
    optimizer = LayerCount("optimizer", torch.float32, 2 * weights, 0, moved, 0, 0)
    count = OperationCount((*layers, *layers, *layers[1:], optimizer), {})
    return modelled_energy(count).joules


def dense_side(model: nn.Module, options, batch) -> tuple[Side, dict[str, float]]:
    """The form of the dense network that makes a step fastest, and milliseconds of all forms."""

    def side(form: str, network: nn.Module) -> Side:
        return Side(network, options, last=form == CHANNELS_LAST, form=form)

    def call(contestant: Side) -> Callable[[], float]:
        return lambda: contestant.step(*batch)

    rivals = [side(*item) for item in dense_forms(model).items()]
    times = interleaved([call(rival) for rival in rivals], budget_s=options.contest)
    found = {rival.form: timing.median_ms for rival, timing in zip(rivals, times, strict=True)}
    best = min(found, key=found.get)
    return side(best, dense_forms(model)[best]), found


def pruning(pattern: str, sparsity: float, batch) -> dict:
    """Arguments of `sk.prune` and `sk.Pruner`: SNIP with one batch."""
    return {
        "method": "snip",
        "sparsity": sparsity,
        "pattern": pattern,
        "data": [batch],
        "loss_fn": F.cross_entropy,
    }


def masked_side(like: Side, options, pattern: str, sparsity: float, batch) -> Side:
    """The dense network `like` under masks, which a Pruner keeps."""
    start = time.perf_counter()
    model = copy.deepcopy(like.model)
    side = replace(like, model=model, options=options, masked=True, wall=[], cpu=[])
    side.pruner = sk.Pruner(side.model, side.optimizer, **pruning(pattern, sparsity, batch))
    side.made_s = time.perf_counter() - start
    return side


def sparse_side(model: nn.Module, options, pattern: str, sparsity: float, batch) -> Side:
    """The network converted: sparse layers, forward and both gradients."""
    start = time.perf_counter()
    model = copy.deepcopy(model)
    sk.prune(model, **pruning(pattern, sparsity, batch))
    model = sk.convert_to_sparse(model, batch[0], mode="training", progress=False)
    layers = sk.report(model).layers
    form = ", ".join(f"{layer.name} {layer.format}" for layer in layers)
    side = Side(model, options, form=form)
    side.pruner = _keep_zeros(side)
    side.made_s = time.perf_counter() - start
    return side


def _keep_zeros(side: Side) -> sk.Pruner | None:
    """Masks for layers that were pruned and stayed dense because that is faster."""
    dense = [m for m in side.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    pruned = any(bool((module.weight == 0).any()) for module in dense)
    return sk.Pruner(side.model, side.optimizer, "keep") if pruned else None


@torch.inference_mode()
def accuracy(side: Side, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Percent of images whose class the network finds."""
    right = 0
    side.model.eval()
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        x = x.contiguous(memory_format=torch.channels_last) if side.last else x
        right += int((side.model(x).argmax(1) == y).sum())
    side.model.train()
    return 100 * right / len(labels)
