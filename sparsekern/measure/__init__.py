"""Measuring: interleaved timing, energy, memory, and the comparison of a dense and a sparse model.

Nothing here imports matplotlib, rich or jinja2 before a report is asked for.
"""

from sparsekern.measure.compare import Comparison, Side, compare
from sparsekern.measure.energy import EnergyReading, find_meter, measure_energy
from sparsekern.measure.energy_model import count_operations, formula_text, modelled_energy
from sparsekern.measure.hardware import commit, hardware
from sparsekern.measure.report_html import write_atomically, write_sweep_html
from sparsekern.measure.timer import Ratio, Timing, interleaved, speedup

__all__ = [
    "Comparison",
    "EnergyReading",
    "Ratio",
    "Side",
    "Timing",
    "commit",
    "compare",
    "count_operations",
    "find_meter",
    "formula_text",
    "hardware",
    "interleaved",
    "measure_energy",
    "modelled_energy",
    "speedup",
    "write_atomically",
    "write_sweep_html",
]
