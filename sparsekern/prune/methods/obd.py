"""Optimal Brain Damage: the diagonal of the Hessian."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...patterns import Pattern
from ..targets import Layer
from ..task import Task, as_tensor
from .base import Method
from .gradients import check_count, rademacher

CURVATURES = ("gauss-newton", "hutchinson")
LARGEST = 1 << 27  # numbers in the Hessians by the outputs of one batch


@dataclass(frozen=True)
class OptimalBrainDamage(Method):
    """Score `h w^2 / 2` with h the diagonal of the Hessian of the loss (LeCun et al. 1989, eq. 5).

    Right for a trained network, where the gradient is near zero. The diagonal is estimated with
    random signs and is exact in expectation:

    * `"gauss-newton"`: `(J^T S u)^2` with `S S^T` the Hessian of the loss by the outputs, never
      negative. It is Levenberg-Marquardt's approximation, which the paper makes, too. A loss must
      treat the samples (dimension 0 of the output) on their own.
    * `"hutchinson"`: `v (H v)` with the full Hessian. Negative estimates count by their size, as in
      AdaHessian (Yao et al. 2021, arXiv:2006.00719): near a minimum they are noise, which is as
      large as the curvature around a weight, and as 0 they would drop half of what matters.

    Attributes:
        curvature: One of these.
        samples: Random vectors per batch, >= 1.
        seed: Seed of the signs.
        training: Score in training mode (batch statistics, dropout) instead of eval mode.
    """

    curvature: str = "gauss-newton"
    samples: int = 8
    seed: int = 0
    training: bool = False
    needs: ClassVar[str] = "loss"

    def __post_init__(self):
        """Check the options."""
        check_count("samples", self.samples)
        if self.curvature not in CURVATURES:
            known = ", ".join(CURVATURES)
            raise ValueError(f"prune: expected curvature one of {known}; got {self.curvature!r}")

    def measure(self, task: Task, layers: Sequence[Layer], pattern: Pattern) -> list[Tensor]:
        """Diagonal of the Hessian, mean over batches and samples."""
        generator = torch.Generator().manual_seed(self.seed)
        estimates = _gauss_newton if self.curvature == "gauss-newton" else _hutchinson
        sums = [torch.zeros_like(layer.weight, dtype=torch.float64) for layer in layers]
        with task.scoring(layers, self.training):
            for output, target in task.outputs():
                for found in estimates(task, layers, output, target, generator, self.samples):
                    sums = [s + f for s, f in zip(sums, found)]
        return [s / (len(task.batches) * self.samples) for s in sums]

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score by the quadratic term of the loss."""
        return total.abs() * layer.weight.double() ** 2 / 2


def _hutchinson(task: Task, layers, output, target, generator, samples) -> Iterator[list[Tensor]]:
    gradients = task.gradients(task.loss(output, target), layers, graph=True)
    for _ in range(samples):
        signs = [rademacher(g.shape, generator, g) for g in gradients]
        product = sum((g * v).sum() for g, v in zip(gradients, signs))
        # A layer after which all is linear has a gradient that no longer depends on it.
        curved = product.requires_grad
        found = task.gradients(product, layers, keep=True, partial=True) if curved else signs
        yield [v * h if curved else v * 0 for v, h in zip(signs, found)]


def _gauss_newton(task: Task, layers, output, target, generator, samples) -> Iterator[list[Tensor]]:
    output = as_tensor(output, "for curvature 'gauss-newton'")
    root = _root_of_hessian(task, output.detach(), target)
    for _ in range(samples):
        signs = rademacher(root.shape[:2], generator, root)
        pulled = (root @ signs[:, :, None]).reshape(output.shape).to(output.dtype)
        yield [g**2 for g in task.gradients((output * pulled).sum(), layers, keep=True)]


def _root_of_hessian(task: Task, output: Tensor, target) -> Tensor:
    """S with `S S^T` the Hessian of the loss by the outputs of each sample, `(N, D, D)`."""
    samples, width = output.shape[0], output[0].numel()
    if samples * width**2 > LARGEST:
        raise ValueError(
            f"prune: expected outputs small enough for curvature 'gauss-newton', got {samples} "
            f"samples of {width}; use smaller batches or curvature='hutchinson'"
        )
    output = output.requires_grad_(True)
    (slope,) = torch.autograd.grad(task.loss(output, target), output, create_graph=True)
    if not slope.requires_grad:
        return output.new_zeros(samples, width, width)
    columns = [
        torch.autograd.grad(part.sum(), output, retain_graph=True)[0].reshape(samples, width)
        for part in slope.reshape(samples, width).unbind(1)
    ]
    values, vectors = torch.linalg.eigh(torch.stack(columns, dim=2).double())
    return vectors * values.clamp(min=0).sqrt()[:, None]
