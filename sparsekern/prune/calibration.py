"""Statistics of layer inputs, gathered with forward hooks while calibration data runs.

Layers are pruned stage by stage in the order in which the model calls them, and a stage sees inputs
that come from the already pruned stages before it. A stage is what shares a name up to the first
number ("encoder.layer.3", "features.4"), so a transformer goes block by block as in the papers. The
forward pass ends as soon as the last layer of the stage has its input.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Batch
from .targets import Layer

CHUNK = 1 << 24  # elements of unfolded input held at a time


class _StageDone(Exception):
    """Ends a forward pass whose remaining layers are not needed."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients, and give every module its training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


class Calibration:
    """Runs the batches through the model and gathers one statistic per layer of a stage."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        batches: Sequence[Batch],
        sequential: bool,
    ):
        """Find the stages with one run of the first batch; `sequential=False` makes one stage."""
        self.model, self.layers, self.batches = model, layers, batches
        calls = self._record_calls()
        self.once = len(calls) == len(layers) == len(set(calls))
        order = list(dict.fromkeys(calls))
        order += [i for i in range(len(layers)) if i not in set(calls)]
        self.stages = _split(order, layers) if sequential else [order]

    def gather(
        self, stage: Sequence[int], statistic: Callable, partial: bool = False
    ) -> dict[int, Tensor]:
        """Sum `statistic(layer, rows)` over all batches for the layers of a stage.

        Args:
            stage: Indices of layers.
            statistic: From a layer and its input rows `(groups, T, fan_in)` to a float64 tensor.
            partial: Leave out a layer that was never called, instead of refusing.

        Raises:
            ValueError: A layer was never called, or its inputs are not finite.
        """
        sums: dict[int, Tensor] = {}
        for batch in self.batches:
            valid = token_mask(batch.kwargs)

            def add(index, inputs, valid=valid):
                for rows in input_rows(self.layers[index], inputs, valid):
                    part = statistic(self.layers[index], rows)
                    sums[index] = sums[index].add_(part) if index in sums else part

            self._visit(stage, batch, add)
        for index in stage:
            if index not in sums and not partial:
                raise ValueError(self._unreached(index))
            if index in sums and not bool(torch.isfinite(sums[index]).all()):
                raise ValueError(
                    f"prune: expected finite inputs of layer {self.layers[index].name!r}, got NaN "
                    "or Inf"
                )
        return sums

    def why_unreached(self, index: int) -> str:
        """Say why no input of a layer was seen."""
        name = self.layers[index].name
        above, _, _ = name.rpartition(".")
        parents = [above, above.rpartition(".")[0]] if name else []
        for parent in parents:
            kind = type(self.model.get_submodule(parent))
            if issubclass(kind, nn.MultiheadAttention | nn.TransformerEncoderLayer):
                return f"{kind.__name__} {parent!r} reads its weight itself and never calls it"
        return "no batch reaches it"

    def _unreached(self, index: int) -> str:
        return (
            f"prune: expected the calibration data to reach layer {self.layers[index].name!r}, got "
            f"no call of it ({self.why_unreached(index)}); add the layer to ignore"
        )

    def inputs(self, stage: Sequence[int], batch: Batch) -> dict[int, list[Tensor]]:
        """Copy what the layers of a stage take in during one batch, call by call.

        Raises:
            ValueError: A layer was never called.
        """
        seen: dict[int, list[Tensor]] = {index: [] for index in stage}
        self._visit(stage, batch, lambda index, inputs: seen[index].append(inputs.clone()))
        for index in stage:
            if not seen[index]:
                raise ValueError(self._unreached(index))
        return seen

    def _visit(self, stage: Sequence[int], batch: Batch, act: Callable) -> None:
        """Call `act(index, inputs)` for every call of a layer of the stage."""
        waiting = set(stage)

        def see(index, inputs):
            act(index, inputs)
            waiting.discard(index)
            if self.once and not waiting:
                raise _StageDone

        self._run(stage, see, batch.args, batch.kwargs)

    def _record_calls(self) -> list[int]:
        calls: list[int] = []
        args, kwargs, _ = self.batches[0]
        self._run(range(len(self.layers)), lambda index, _: calls.append(index), args, kwargs)
        return calls

    def _run(self, stage, see: Callable, args, kwargs) -> None:
        def hook(index):
            def seen(_, inputs, named):
                see(index, inputs[0] if inputs else named["input"])

            return seen

        handles = [
            self.layers[i].module.register_forward_pre_hook(hook(i), with_kwargs=True)
            for i in stage
        ]
        try:
            with suppress(_StageDone):
                self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def input_rows(layer: Layer, inputs: Tensor, valid: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the rows a layer multiplies with its flattened weight, in chunks.

    Args:
        layer: Linear, Conv1D or convolution.
        inputs: `(..., in)`, or `(batch, in, *size)` for a convolution.
        valid: Boolean `(batch, length)`; where it has the leading shape of a linear layer's inputs,
            only its True rows count (padding is no data).

    Yields:
        `(groups, T, in / groups * kernel positions)`, columns in the order of the weight's own.
    """
    if layer.weight.ndim == 2:
        if valid is not None and inputs.ndim == 3 and valid.shape == inputs.shape[:2]:
            inputs = inputs[valid.to(inputs.device)]
        yield inputs.reshape(1, -1, inputs.shape[-1])
        return
    if inputs.ndim == layer.weight.ndim - 1:
        inputs = inputs[None]
    per_sample = inputs[0].numel() * layer.weight[0, 0].numel()
    for part in inputs.split(max(1, CHUNK // max(1, per_sample))):
        yield _unfold(layer.module, part)


def _unfold(conv: nn.Module, inputs: Tensor) -> Tensor:
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    windows = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
    spatial = len(conv.kernel_size)
    for axis, (size, step, gap) in enumerate(
        zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    batch, channels = inputs.shape[:2]
    windows = windows.reshape(batch, conv.groups, channels // conv.groups, *windows.shape[2:])
    places = range(3, 3 + spatial)
    kernel = range(3 + spatial, 3 + 2 * spatial)
    rows = windows.permute(1, 0, *places, 2, *kernel)
    return rows.reshape(conv.groups, -1, channels // conv.groups * conv.weight[0, 0].numel())


def _split(order: Sequence[int], layers: Sequence[Layer]) -> list[list[int]]:
    stages: list[list[int]] = []
    last = None
    for index in order:
        name = layers[index].name
        match = re.match(r"(.*?\.)??\d+(?=\.|$)", name)
        key = match[0] if match else name
        if key != last:
            stages.append([])
        stages[-1].append(index)
        last = key
    return stages


def token_mask(kwargs: Mapping) -> Tensor | None:
    """The attention mask among keyword inputs, boolean `(batch, length)`, or None."""
    mask = kwargs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
