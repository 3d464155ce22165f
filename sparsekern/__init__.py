"""sparsekern: pruned PyTorch networks that really run faster, smaller and cheaper."""

from . import patterns
from ._load import available_isas, cpu_isa
from .conversion import ConversionReport, LayerReport
from .convert import convert_to_sparse, report, to_dense
from .nn import SparseConv2d, SparseLinear
from .weights import CSRWeight

__version__ = "0.1.0"
__all__ = [
    "convert_to_sparse",
    "report",
    "to_dense",
    "ConversionReport",
    "LayerReport",
    "SparseLinear",
    "SparseConv2d",
    "CSRWeight",
    "patterns",
    "cpu_isa",
    "available_isas",
]
