"""Pruning: score x pattern x scope x schedule x update rule."""

from . import schedules
from .api import prune
from .finetune import adjusted_dropout, distillation_loss, recalibrate_batchnorm
from .lottery import LotteryTicket
from .masks import MaskOverlap, layer_collapse, mask_overlap
from .methods.slimming import slimming_penalty
from .owl import owl
from .penalties import weight_penalty
from .pruner import Pruner
from .reconstruct import Reconstruction, reconstruct
from .report import PrunedLayer, PruneReport
from .sensitivity import Sensitivity, sensitivity
from .threshold import threshold_scope

__all__ = [
    "LotteryTicket",
    "MaskOverlap",
    "PruneReport",
    "PrunedLayer",
    "Pruner",
    "Reconstruction",
    "Sensitivity",
    "adjusted_dropout",
    "distillation_loss",
    "layer_collapse",
    "mask_overlap",
    "owl",
    "prune",
    "recalibrate_batchnorm",
    "reconstruct",
    "schedules",
    "sensitivity",
    "slimming_penalty",
    "threshold_scope",
    "weight_penalty",
]
