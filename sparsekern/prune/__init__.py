"""Pruning: score x pattern x scope x schedule x update rule."""

from . import schedules
from .api import prune
from .dead import DeadNeurons, remove_dead_neurons
from .finetune import adjusted_dropout, distillation_loss, recalibrate_batchnorm
from .lottery import LotteryTicket
from .masks import (
    MaskOverlap,
    WeightHistogram,
    layer_collapse,
    mask_overlap,
    sparsity_report,
    weight_histogram,
)
from .methods.slimming import slimming_penalty
from .owl import owl
from .penalties import weight_penalty
from .permute import permute_channels
from .pruner import Pruner
from .reconstruct import Reconstruction, reconstruct
from .report import PrunedLayer, PruneReport
from .sensitivity import Sensitivity, sensitivity
from .threshold import threshold_scope

__all__ = [
    "DeadNeurons",
    "LotteryTicket",
    "MaskOverlap",
    "PruneReport",
    "PrunedLayer",
    "Pruner",
    "Reconstruction",
    "Sensitivity",
    "WeightHistogram",
    "adjusted_dropout",
    "distillation_loss",
    "layer_collapse",
    "mask_overlap",
    "owl",
    "permute_channels",
    "prune",
    "recalibrate_batchnorm",
    "reconstruct",
    "remove_dead_neurons",
    "schedules",
    "sensitivity",
    "slimming_penalty",
    "sparsity_report",
    "threshold_scope",
    "weight_histogram",
    "weight_penalty",
]
