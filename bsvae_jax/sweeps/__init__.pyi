from .curves import compare_with_theory
from .plots import COLORS, MARKERS
from .report import best_beta, draw
from .results import families, mean_and_deviation
from .table import HEADINGS, display_rows

__all__ = [
    "COLORS",
    "HEADINGS",
    "MARKERS",
    "best_beta",
    "compare_with_theory",
    "display_rows",
    "draw",
    "families",
    "mean_and_deviation",
]
