from .figures import draw
from .metrics import ACTIVE_THRESHOLD, Quantity
from .plots import new_figure, training_curves

__all__ = [
    "ACTIVE_THRESHOLD",
    "Quantity",
    "draw",
    "new_figure",
    "training_curves",
]
