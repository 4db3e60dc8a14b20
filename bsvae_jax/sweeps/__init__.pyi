from .curves import compare_with_theory
from .plots import COLORS, MARKERS
from .report import best_beta, draw
from .results import HEADINGS, display_rows, families, mean_and_deviation

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
