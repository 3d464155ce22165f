"""What one does after pruning: fresh BatchNorm statistics, a teacher, less dropout."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .data import read_batches


def recalibrate_batchnorm(model: nn.Module, data: Iterable) -> int:
    """Measure the statistics of all BatchNorms anew, as pruning shifts what they see.

    Running means and variances become plain averages over the batches; everything else runs in eval
    mode, and nothing else changes.

    Args:
        model: Any module.
        data: As for `prune`: inputs, or pairs of which the target is ignored.

    Returns:
        Number of BatchNorms.

    Raises:
        ValueError: No batch.
        TypeError: Data in no known form.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    batches = read_batches(data)
    flags = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            for batch in batches:
                model(*batch.args, **batch.kwargs)
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, training in flags:
            module.training = training
    return len(norms)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: float = 2.0,
    alpha: float = 0.5,
) -> Tensor:
    """Learn from the dense model: `alpha T^2 KL(teacher || student) + (1 - alpha) cross entropy`.

    Hinton et al. 2015, arXiv:1503.02531, section 2, with both distributions at temperature T.

    Args:
        student: Logits `(..., classes)`.
        teacher: Logits of the same shape; no gradient flows into them.
        target: Class indices `(...)`, or None for distillation alone (alpha counts as 1).
        temperature: T, > 0.
        alpha: Share of the teacher, in [0, 1].

    Returns:
        Scalar, mean over all but the last dimension.

    Raises:
        ValueError: Shapes that differ, or a bad temperature or alpha.
    """
    if student.shape != teacher.shape:
        got = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"distillation_loss: expected logits of one shape, got {got}")
    if not temperature > 0:
        raise ValueError(f"distillation_loss: expected temperature > 0, got {temperature!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"distillation_loss: expected alpha in [0, 1], got {alpha!r}")
    student, teacher = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    soft = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    soft = soft * temperature**2
    if target is None:
        return soft
    return alpha * soft + (1 - alpha) * F.cross_entropy(student, target.flatten())


def adjusted_dropout(rate: float, sparsity: float) -> float:
    """Dropout rate for retraining a pruned layer, `rate * sqrt(1 - sparsity)`.

    Han et al. 2015, arXiv:1506.02626, eq. 2: a layer of fewer connections overfits less.

    Raises:
        ValueError: A value outside [0, 1].
    """
    for name, value in (("rate", rate), ("sparsity", sparsity)):
        if not 0 <= value <= 1:
            raise ValueError(f"adjusted_dropout: expected {name} in [0, 1], got {value!r}")
    return rate * math.sqrt(1 - sparsity)
