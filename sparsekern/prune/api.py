"""One-shot pruning: `prune`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..patterns import Pattern
from .collapse import warn_of_collapse
from .job import prepare
from .report import PruneReport, make_report


def prune(
    model: nn.Module,
    method: str = "magnitude",
    sparsity: float | None = None,
    pattern: str | Pattern = "unstructured",
    scope: str | Mapping[str, float] | None = None,
    data: Iterable | None = None,
    loss_fn=None,
    targets: type | Sequence[type] = (nn.Linear, nn.Conv2d),
    ignore: str | type | Iterable[str | type] = (),
    progress: bool | None = None,
    distributed: bool | None = None,
    **method_options,
) -> PruneReport:
    """Set the least important weights of a model to zero, in place.

    Everything is checked before anything changes, and a failure on the way puts the weights back.
    The result is deterministic: equal scores are decided by index. Weights that are 0 already go
    first, whatever their score, so that pruning again comes to the sparsity that is asked for.

    Args:
        model: Any module, also one in `DistributedDataParallel` (layers go by their names inside),
            but none in FSDP; a single layer has the name "". Layers stay on their devices. A weight
            that several modules share is pruned once.
        method: From weights alone: `"magnitude"`, `"lp"`, `"fpgm"`, `"slimming"` and `"random"`.
            From inputs: `"wanda"`, `"sparsegpt"`, `"refit"`, `"apoz"` and `"synflow"` (of which
            only shapes count). From gradients of a loss: `"snip"`, `"grasp"`, `"taylor"`, `"obd"`
            and `"skeletonization"`. Each method's class in `sparsekern.prune.methods` names its
            paper and options.
        sparsity: Share of zeros in [0, 1) over the pruned weights; default 0.9, or what an N:M
            pattern fixes (then any other value is an error).
        pattern: Pattern or its string, see `sparsekern.patterns.parse`.
        scope: `"global"` ranks the units of all layers together, `"uniform"` prunes every layer
            alike, `"erk"` by the Erdos-Renyi-kernel rule, `"lamp"` by layer-adaptive magnitudes,
            `"std"` by magnitudes against the standard deviation of their layer (Han et al. 2015);
            exact to one unit, per layer for uniform, otherwise in total. A dict gives
            `{layer name or glob: sparsity}`; layers it does not name get `sparsity`, or stay dense
            without one. Default: the method's own. Every layer keeps at least one unit. N:M prunes
            every layer alike under any scope.
        data: Calibration data for methods that need it: an iterable of inputs or of
            `(input, target)`, an input being a tensor, a tuple of positional inputs, or a dict of
            keyword inputs. With a dict that holds an `attention_mask`, padding does not count.
        loss_fn: `loss_fn(output, target)` for methods that score by gradients, giving a scalar; the
            target is None for data without. Others ignore it.
        targets: Layer types to prune; `nn.Linear` includes transformers' `Conv1D`.
        ignore: Layers to leave alone, by name, glob, name of a module around them, or type.
        progress: Show a progress bar over stages or rounds; None shows it in a terminal when there
            are many.
        distributed: Every rank calls `prune`, with data of its own: gradients and statistics are
            averaged over the ranks, and all prune alike. None: for a model in
            `DistributedDataParallel`. Without it nothing is exchanged, and ranks with other data
            get other masks.
        **method_options: Fields of the method's class, as `seed=` or `percdamp=`.

    Returns:
        The report. It lists every weight that was left as it is, with its size and the reason:
        layers the pattern cannot divide, weights that are computed, other types of layer. A layer
        that the data does not reach is pruned by magnitude, and its `note` says so. A warning names
        layers of which next to nothing is left.

    Raises:
        ValueError: A bad value, no prunable layer, weights that are NaN, Inf or on meta, missing
            data or loss, a loss that does not depend on a layer, a method that needs training, or
            a Hessian that cannot be factored.
        TypeError: An argument of the wrong type, or an unknown method option.
    """
    common = (pattern, scope, data, loss_fn, targets, ignore, method_options)
    job, skipped = prepare(model, method, sparsity, *common, distributed=distributed)
    layers = [replace(layer, alive=_nonzero(layer.weight)) for layer in job.layers]
    masks = replace(job, layers=layers, progress=progress).run()
    warn_of_collapse("prune", layers, masks, job.scope)
    where = skipped, job.task.model, job.task.notes
    return make_report(method, job.pattern, job.scope, job.layers, *where)


def _nonzero(weight: Tensor) -> Tensor | None:
    """What earlier prunings left; None if that is everything."""
    alive = weight != 0
    return None if bool(alive.all()) else alive
