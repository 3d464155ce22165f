"""Regression-based reconstruction: the weights that survive make up for those that are gone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..patterns import Unstructured
from ..progress import track
from .calibration import Calibration, evaluating, input_rows, token_mask
from .data import read_batches
from .methods.base import zero_out
from .regression import by_groups, least_squares
from .slots import mask_beside
from .targets import Layer, find_layers, restored_on_error


@dataclass(frozen=True)
class Reconstruction:
    """Squared error of a layer's outputs over the squared outputs, before and after.

    Attributes:
        before: By layer name.
        after: By layer name.
    """

    before: dict[str, float]
    after: dict[str, float]


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    data: Iterable,
    ridge: float = 0.01,
    iterations: int = 20,
    sequential: bool = True,
    targets: type | Sequence[type] = (nn.Linear, nn.Conv2d),
    ignore: str | type | Iterable[str | type] = (),
    progress: bool | None = None,
) -> Reconstruction:
    """Refit what is left of the weights, layer by layer, to what the dense model has there.

    For each pruned layer the kept weights minimise `||X W^T - Y||^2 + lambda ||W - W_dense||^2`: X
    are its inputs in the pruned model, whose earlier stages are refitted already, and Y the outputs
    of the dense layer on the dense model's inputs, so that a later layer repairs earlier ones. He
    et al. 2017, arXiv:1707.06168, eq. 1 (its regression for W, here for any mask and row by row);
    no label and no gradient is needed. Works after any method and pattern; zeros stay zeros. In a
    distributed run give every rank the same data.

    Args:
        model: The pruned model; its kept weights change in place. A mask of a `Pruner` tells which
            are kept, otherwise those that are not 0. Layers without zeros stay as they are.
        dense: The model as it was before pruning, with the same layers; left as it is.
        data: Inputs, as for `prune`.
        ridge: lambda over the mean squared input of the layer, >= 0.
        iterations: Conjugate gradient iterations, >= 1.
        sequential: Stage by stage, or all layers with inputs of the model as it is now.
        targets: As for `prune`.
        ignore: As for `prune`.
        progress: Show a progress bar over the stages, as for `prune`.

    Raises:
        ValueError: A bad value, other layers in `dense`, no pruned layer, inputs that are not
            finite, or as for `prune`; the model is then as it was.
        TypeError: As for `prune`.
    """
    _check(ridge, iterations)
    pairs = _pairs(model, dense, targets, ignore)
    batches, result = read_batches(data), Reconstruction({}, {})
    layers = [pruned for pruned, _ in pairs]
    with evaluating(model), evaluating(dense), restored_on_error(layers):
        runs = Calibration(model, layers, batches, sequential)
        reference = Calibration(dense, [whole for _, whole in pairs], batches, sequential)
        for stage in track(runs.stages, "refitting", progress):
            sums = {i: _Sums.zeros(layers[i]) for i in stage}
            for batch in batches:
                valid = token_mask(batch.kwargs)
                wanted = reference.inputs(stage, batch)
                found = runs.inputs(stage, batch)
                for i in stage:
                    for x, y in zip(found[i], wanted[i], strict=True):
                        sums[i].add(*pairs[i], x, y, valid)
            for i in stage:
                _refit(*pairs[i], sums[i], ridge, iterations, result)
    return result


@dataclass
class _Sums:
    """What the regression of a layer needs of its data, `(groups, ...)`.

    Attributes:
        gram: `X^T X`, `(groups, fan_in, fan_in)`.
        cross: `Y^T X`, `(groups, out / groups, fan_in)`.
        energy: Sum of Y^2, `()`.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor

    @classmethod
    def zeros(cls, layer: Layer) -> "_Sums":
        rows = by_groups(layer)
        groups, _, fan_in = rows.shape
        gram = rows.new_zeros(groups, fan_in, fan_in)
        return cls(gram, torch.zeros_like(rows), rows.new_zeros(()))

    def add(self, pruned: Layer, whole: Layer, x: Tensor, reference: Tensor, valid) -> None:
        """Add the inputs of one call, in the pruned and in the dense model."""
        weight = by_groups(whole)
        chunks = input_rows(pruned, x, valid), input_rows(whole, reference, valid)
        for rows, wanted in zip(*chunks, strict=True):
            rows, wanted = rows.to(self.gram.dtype), wanted.to(weight.dtype)
            y = wanted @ weight.mT + _missing_bias(pruned, whole).to(weight)
            self.gram += rows.mT @ rows
            self.cross += y.mT.to(rows.dtype) @ rows
            self.energy += y.square().sum()

    def error(self, weight: Tensor) -> float:
        """`||X W^T - Y||^2 / ||Y||^2` of weights `(groups, out / groups, fan_in)`."""
        product = weight @ self.gram - 2 * self.cross
        squares = (weight.double() * product).sum() + self.energy
        return float((squares / self.energy).clamp_min(0)) if self.energy > 0 else 0.0


def _refit(pruned: Layer, whole: Layer, sums: _Sums, ridge, iterations, result) -> None:
    if not all(bool(torch.isfinite(t).all()) for t in (sums.gram, sums.cross)):
        raise ValueError(
            f"reconstruct: expected finite inputs of layer {pruned.name!r}, got NaN or Inf"
        )
    weight, mask = by_groups(pruned), _kept(pruned)
    result.before[pruned.name] = sums.error(weight)
    grouped, start = mask.reshape(weight.shape), by_groups(whole)
    found = least_squares(weight, grouped, start, sums.gram, sums.cross, ridge, iterations)
    pruned.weight.copy_(found.reshape(pruned.weight.shape))
    zero_out(pruned, mask)
    result.after[pruned.name] = sums.error(by_groups(pruned))


def _kept(layer: Layer) -> Tensor:
    mask = mask_beside(layer.module)
    return layer.weight != 0 if mask is None else layer.oriented(mask)


def _missing_bias(pruned: Layer, whole: Layer) -> Tensor:
    """What the bias of the dense layer adds that the pruned one's does not, `(groups, 1, n)`."""
    zero = whole.weight.new_zeros(whole.weight.shape[0])
    first, second = (getattr(side.module, "bias", None) for side in (whole, pruned))
    gap = (zero if first is None else first) - (zero if second is None else second)
    return gap.reshape(whole.groups, 1, -1)


def _check(ridge, iterations) -> None:
    if not isinstance(ridge, int | float) or not 0 <= ridge < float("inf"):
        raise ValueError(f"reconstruct: expected ridge >= 0, got {ridge!r}")
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"reconstruct: expected iterations to be an int >= 1, got {iterations!r}")


def _pairs(model, dense, targets, ignore) -> list[tuple[Layer, Layer]]:
    """Layers to refit, each with its dense twin."""
    if model is dense:
        raise ValueError("reconstruct: expected dense to be another model, got the pruned one")
    sides = [find_layers(side, targets, ignore, Unstructured())[0] for side in (model, dense)]
    listed = [[(la.name, tuple(la.weight.shape)) for la in side] for side in sides]
    if listed[0] != listed[1]:
        raise ValueError(
            f"reconstruct: expected a dense model with the layers {listed[0]}, got {listed[1]}"
        )
    pairs = [pair for pair in zip(*sides) if not bool(_kept(pair[0]).all())]
    if not pairs:
        raise ValueError("reconstruct: expected a model with pruned layers, got none with zeros")
    return pairs
