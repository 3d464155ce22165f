"""OWL: blocks with more outliers keep more weights."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..patterns import Unstructured
from ..ranking import check_sparsity
from .calibration import Calibration, evaluating
from .data import read_batches
from .methods.wanda import Wanda
from .targets import find_layers


def owl(
    model: nn.Module,
    data: Iterable,
    sparsity: float,
    threshold: float = 5.0,
    spread: float = 0.08,
    targets: type | Sequence[type] = (nn.Linear, nn.Conv2d),
    ignore: str | type | Iterable[str | type] = (),
) -> dict[str, float]:
    """Outlier-weighed layerwise sparsity (Yin et al. 2024, arXiv:2310.05175), for `prune(scope=)`.

    The outlier share of a block is that of its weights with `|w| ||x||` above `threshold` times the
    block's mean. Densities of the blocks are an affine map of it, with a range of `2 spread` and
    the wanted mean over all weights. A block is what shares a name up to the first number, as for
    Wanda; with equal blocks the result is the paper's. In a distributed run give every rank the
    same data.

    Args:
        model: Any module.
        data: Calibration inputs, as for `prune`.
        sparsity: Share of zeros over all layers, in [0, 1).
        threshold: M in the paper, > 0.
        spread: Lambda in the paper, in [0, min(sparsity, 1 - sparsity)].
        targets: As for `prune`.
        ignore: As for `prune`.

    Returns:
        Sparsity by layer name.

    Raises:
        ValueError: A value out of range, or as for `prune`.
        TypeError: As for `prune`.
    """
    check_sparsity("owl", sparsity)
    if not threshold > 0:
        raise ValueError(f"owl: expected threshold > 0, got {threshold!r}")
    if not 0 <= spread <= min(sparsity, 1 - sparsity):
        limit = min(sparsity, 1 - sparsity)
        raise ValueError(f"owl: expected spread in [0, {limit:g}], got {spread!r}")
    layers, _ = find_layers(model, targets, ignore, Unstructured())
    shares: list[float] = []
    with evaluating(model):
        runs = Calibration(model, layers, read_batches(data), sequential=True)
        for stage in runs.stages:
            totals = runs.gather(stage, Wanda.statistic)
            scores = torch.cat([Wanda().score(layers[i], totals[i]).flatten() for i in stage])
            shares.append(float((scores > threshold * scores.mean()).double().mean()))
    sizes = [sum(layers[i].weight.numel() for i in stage) for stage in runs.stages]
    densities = _densities(torch.tensor(shares), torch.tensor(sizes), 1 - sparsity, spread)
    wanted = zip(runs.stages, densities.tolist())
    return {layers[i].name: 1 - density for stage, density in wanted for i in stage}


def _densities(shares: Tensor, sizes: Tensor, mean: float, spread: float) -> Tensor:
    shares, sizes = shares.double(), sizes.double()
    width = shares.max() - shares.min()
    offsets = (shares - shares.min()) / width * 2 * spread if width > 0 else shares * 0
    return (offsets - (offsets * sizes).sum() / sizes.sum() + mean).clamp(0, 1)
