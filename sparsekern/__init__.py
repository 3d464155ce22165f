"""sparsekern: pruned PyTorch networks that really run faster, smaller and cheaper."""

from . import patterns
from ._load import available_isas, cpu_isa
from .nn import SparseConv2d, SparseLinear
from .weights import CSRWeight

__version__ = "0.1.0"
__all__ = [
    "SparseLinear",
    "SparseConv2d",
    "CSRWeight",
    "patterns",
    "cpu_isa",
    "available_isas",
]
