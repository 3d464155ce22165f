"""sparsekern: pruned PyTorch networks that really run faster, smaller and cheaper."""

from . import patterns
from ._load import available_isas, cpu_isa
from .conversion import ConversionReport, LayerReport, report
from .convert import convert_to_sparse
from .dense import to_dense
from .doctor import doctor
from .fold import fold_batchnorm
from .measure import Comparison, compare
from .nn import SparseConv2d, SparseLinear
from .prune import (
    LotteryTicket,
    Pruner,
    PruneReport,
    adjusted_dropout,
    distillation_loss,
    layer_collapse,
    mask_overlap,
    owl,
    permute_channels,
    prune,
    recalibrate_batchnorm,
    reconstruct,
    remove_dead_neurons,
    schedules,
    sensitivity,
    slimming_penalty,
    sparsity_report,
    threshold_scope,
    weight_histogram,
    weight_penalty,
)
from .quantize import QuantizationReport, quantize
from .storage import load, save
from .weights import BlockWeight, CSRWeight, NMWeight
from .weights_int8 import (
    DynamicFloat8NMWeight,
    DynamicInt8BlockWeight,
    DynamicInt8NMWeight,
    Float8NMWeight,
    Int8BlockWeight,
    Int8CSRWeight,
    Int8NMWeight,
)

__version__ = "0.1.0"
__all__ = [
    "prune",
    "PruneReport",
    "Pruner",
    "schedules",
    "sensitivity",
    "LotteryTicket",
    "owl",
    "threshold_scope",
    "recalibrate_batchnorm",
    "adjusted_dropout",
    "distillation_loss",
    "slimming_penalty",
    "weight_penalty",
    "reconstruct",
    "remove_dead_neurons",
    "permute_channels",
    "layer_collapse",
    "mask_overlap",
    "sparsity_report",
    "weight_histogram",
    "convert_to_sparse",
    "report",
    "to_dense",
    "fold_batchnorm",
    "ConversionReport",
    "LayerReport",
    "quantize",
    "QuantizationReport",
    "compare",
    "Comparison",
    "save",
    "load",
    "doctor",
    "SparseLinear",
    "SparseConv2d",
    "BlockWeight",
    "CSRWeight",
    "DynamicFloat8NMWeight",
    "DynamicInt8BlockWeight",
    "DynamicInt8NMWeight",
    "Float8NMWeight",
    "Int8BlockWeight",
    "Int8CSRWeight",
    "Int8NMWeight",
    "NMWeight",
    "patterns",
    "cpu_isa",
    "available_isas",
]
